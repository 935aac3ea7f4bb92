//! Free loopback ports that stay ours.
//!
//! Asking the kernel for port 0 gives a port of the ephemeral range. While a server is down (and tests take servers
//! down all the time) any outgoing connection may be given that same port; a client that keeps connecting to it can
//! even meet itself. So ports come from below that range, and each is reserved by a file lock for as long as its
//! service's handle lives, so that tests running side by side choose different ones.

use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{IoContext, StartError};

/// Below Linux' ephemeral range (32768-60999), above the ports of well-known services.
const FIRST: u16 = 15_000;
const LAST: u16 = 31_999;
/// On loopback the answer comes at once, unless a paused listener's queue is full.
const CONNECT_LIMIT: Duration = Duration::from_millis(500);

/// A port with its reservation; freed when dropped.
#[derive(Debug)]
pub(crate) struct PortLease {
    pub(crate) port: u16,
    _lock: File,
}

impl PortLease {
    /// Reserves a free port chosen at random.
    pub(crate) fn free() -> Result<Self, StartError> {
        let span = LAST - FIRST + 1;
        let offset = (RandomState::new().build_hasher().finish() % u64::from(span)) as u16;
        for step in 0..span {
            let port = FIRST + (offset + step) % span;
            if let Some(lease) = Self::try_lock(port)?
                && is_free(port)
            {
                return Ok(lease);
            }
        }
        Err(StartError::NoFreePort { from: FIRST, to: LAST })
    }

    /// Reserves this port. The server itself may already hold it, so it isn't tried.
    pub(crate) fn fixed(service: &'static str, port: u16) -> Result<Self, StartError> {
        Self::try_lock(port)?.ok_or(StartError::PortTaken { service, port })
    }

    fn try_lock(port: u16) -> Result<Option<Self>, StartError> {
        let dir = lock_dir()?;
        let path = dir.join(port.to_string());
        let file = OpenOptions::new().create(true).append(true).open(&path).context("cannot open", &path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { port, _lock: file })),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(error).context("cannot lock", &path),
        }
    }
}

/// Whether nobody listens on this loopback port.
///
/// Asked by connecting, not by listening for a moment: a listening socket of ours would be inherited by every server
/// that another thread is just starting, until that one reaches its `exec`, and the port would be in use by ourselves.
pub(crate) fn is_free(port: u16) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(_) => false,
    }
}

fn lock_dir() -> Result<PathBuf, StartError> {
    let dir = std::env::temp_dir().join(format!("flotilla-ports-{}", nix::unistd::geteuid()));
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).context("cannot create", &dir)
        }
        _ => Ok(dir),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_listening_port_is_not_free() {
        let lease = PortLease::free().unwrap();
        assert!(is_free(lease.port));
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, lease.port)).unwrap();
        assert!(!is_free(lease.port));
        drop(listener);
        assert!(is_free(lease.port));
    }

    #[test]
    fn leases_held_together_differ_and_a_held_port_is_refused() {
        let leases: Vec<_> = (0..50).map(|_| PortLease::free().unwrap()).collect();
        let ports: HashSet<_> = leases.iter().map(|lease| lease.port).collect();
        assert_eq!(ports.len(), leases.len());
        let taken = leases[0].port;
        assert!(
            matches!(PortLease::fixed("test", taken), Err(StartError::PortTaken { port, .. }) if port == taken)
        );
        drop(leases);
        assert_eq!(PortLease::fixed("test", taken).unwrap().port, taken);
    }
}
