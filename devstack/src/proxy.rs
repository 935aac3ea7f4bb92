//! A TCP proxy on loopback between clients and one server, whose link can be cut, hung and slowed down.
//!
//! ```no_run
//! # async fn example() -> Result<(), devstack::StartError> {
//! use devstack::{Link, Proxy};
//!
//! let proxy = Proxy::start(5432)?;
//! proxy.set(Link::Cut); // what is connected is closed, and so is whatever connects
//! proxy.set(Link::Open);
//! # Ok(()) }
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::error::{IoContext, StartError};
use crate::ports::PortLease;

/// Connections at once; what comes beyond waits in the kernel's queue.
const CONNECTIONS: usize = 1024;
/// Bytes of one direction of one connection that the proxy holds.
const BUFFER: usize = 16 * 1024;

/// The state of the way between the clients and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Everything passes at once.
    Open,
    /// Each piece, of 16 KiB at most, passes so much later, in both directions.
    Slow(Duration),
    /// Connections stay and are made, and nothing passes. What was sent meanwhile passes later.
    Hung,
    /// Connections are closed, and new ones are closed as soon as they are made.
    Cut,
}

/// A proxy in front of one server. Ends, and closes all its connections, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: PortLease,
    link: watch::Sender<Link>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free loopback port for the server on loopback port `target`. Needs a tokio runtime.
    pub fn start(target: u16) -> Result<Self, StartError> {
        let port = PortLease::free()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.port));
        let listener = std::net::TcpListener::bind(address)
            .and_then(|listener| {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)
            })
            .context("cannot listen on", address.to_string())?;
        let link = watch::Sender::new(Link::Open);
        let accepting = tokio::spawn(accept(listener, target, link.subscribe()));
        Ok(Self { port, link, accepting })
    }

    /// Its own port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port.port
    }

    /// Changes the link, for the connections that are there, too.
    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The pumps see that the sender is gone.
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, target: u16, link: watch::Receiver<Link>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::warn!(%error, "the proxy can't accept a connection");
                // Out of descriptors, usually: they come back when connections end.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if *link.borrow() == Link::Cut {
            continue;
        }
        let link = link.clone();
        tokio::spawn(async move {
            if let Err(error) = connect(client, target, link).await {
                tracing::debug!(%error, target, "a proxied connection ended");
            }
            drop(place);
        });
    }
}

/// Serves one connection until either side ends it or the link is cut.
async fn connect(client: TcpStream, target: u16, link: watch::Receiver<Link>) -> std::io::Result<()> {
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut cut = link.clone();
    tokio::select! {
        done = pump(from_client, to_server, link.clone()) => done,
        done = pump(from_server, to_client, link) => done,
        // The proxy's end is a cut, too.
        _ = cut.wait_for(|link| *link == Link::Cut) => Ok(()),
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let Ok(state) = link.wait_for(|link| *link != Link::Hung).await.map(|link| *link) else {
            return Ok(());
        };
        if let Link::Slow(delay) = state {
            tokio::time::sleep(delay).await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Instant;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// A server that sends back what it gets.
    async fn echo() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await.ok();
                });
            }
        });
        port
    }

    async fn client(proxy: &Proxy) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await.unwrap()
    }

    async fn answer(stream: &mut TcpStream) -> std::io::Result<u8> {
        stream.write_all(b"x").await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn an_open_link_passes_and_a_cut_one_closes_what_is_there_and_what_comes() {
        let proxy = Proxy::start(echo().await).unwrap();
        let mut old = client(&proxy).await;
        assert_eq!(answer(&mut old).await.unwrap(), b'x');
        proxy.set(Link::Cut);
        assert!(timeout(SOON, old.read_u8()).await.unwrap().is_err());
        let mut new = client(&proxy).await;
        assert!(timeout(SOON, new.read_u8()).await.unwrap().is_err());
        proxy.set(Link::Open);
        assert_eq!(answer(&mut client(&proxy).await).await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn a_hung_link_keeps_what_was_sent_until_it_opens() {
        let proxy = Proxy::start(echo().await).unwrap();
        let mut stream = client(&proxy).await;
        assert_eq!(answer(&mut stream).await.unwrap(), b'x');
        proxy.set(Link::Hung);
        stream.write_all(b"late").await.unwrap();
        let mut seen = [0; 4];
        assert!(timeout(Duration::from_millis(200), stream.read_exact(&mut seen)).await.is_err());
        proxy.set(Link::Open);
        timeout(SOON, stream.read_exact(&mut seen)).await.unwrap().unwrap();
        assert_eq!(&seen, b"late");
    }

    #[tokio::test]
    async fn a_slow_link_takes_its_time_in_both_directions() {
        let proxy = Proxy::start(echo().await).unwrap();
        let mut stream = client(&proxy).await;
        proxy.set(Link::Slow(Duration::from_millis(50)));
        let begun = Instant::now();
        assert_eq!(answer(&mut stream).await.unwrap(), b'x');
        assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_dropped_proxy_closes_its_connections() {
        let proxy = Proxy::start(echo().await).unwrap();
        let mut stream = client(&proxy).await;
        assert_eq!(answer(&mut stream).await.unwrap(), b'x');
        drop(proxy);
        assert!(timeout(SOON, stream.read_u8()).await.unwrap().is_err());
    }
}
