#!/bin/sh
# A rustc wrapper: cargo runs it as `rustc-edge.sh RUSTC ARGS...`.
#
# qdrant-edge 0.9.0 uses `assert_matches!`, which is stable from Rust 1.96. On an older compiler that one library
# feature is switched on for that one crate; every other call goes through untouched, and from Rust 1.96 on every
# call does.
case " $* " in
  *" --crate-name qdrant_edge "*)
    minor=$("$1" --version | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
    if [ "${minor:-96}" -lt 96 ]; then
      RUSTC_BOOTSTRAP=1 exec "$@" '-Zcrate-attr=feature(assert_matches)'
    fi
    ;;
esac
exec "$@"
