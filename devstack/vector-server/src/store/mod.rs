//! The collections of one data directory, their aliases, and the two background loops.
//!
//! ```text
//! DATA/lock                                  held while a server runs
//! DATA/aliases.json                          alias to collection, replaced atomically
//! DATA/collections/00000007/collection.pb    what was asked for at creation; written last, removed first
//! DATA/collections/00000007/shard/           the engine's files
//! ```
//!
//! Directories are numbered and a number is never used twice by one process, so that a collection's name is never
//! a path, and a late file of a deleted collection can't land in its successor of the same name.

mod aliases;
mod atomic_file;
mod background;
mod catalog;
mod collection;
mod flusher;
mod lock;
mod optimiser;

pub use background::BackgroundLoop;
pub use catalog::Store;
pub use collection::Collection;
pub use flusher::spawn as spawn_flusher;
pub use lock::DirectoryLock;
pub use optimiser::spawn as spawn_optimiser;
