//! A way to Postgres that loses the reply to a commit, or the commit itself.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// What happens to the next `COMMIT` of a transaction that may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Next {
    Pass,
    /// Postgres commits, and the connection ends before its reply.
    LoseReply,
    /// The connection ends before Postgres hears of it.
    LoseCommit,
    /// As `LoseReply`, and no connection is let through after it.
    LoseReplyAndAll,
    /// No connection is let through.
    Closed,
}

pub struct Proxy {
    pub port: u16,
    next: Arc<AtomicU8>,
}

impl Proxy {
    /// Listens on a free port; ends with the test's runtime.
    pub async fn to(postgres: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let next = Arc::new(AtomicU8::new(Next::Pass as u8));
        let shared = Arc::clone(&next);
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(forward(client, postgres, Arc::clone(&shared)));
            }
        });
        Self { port, next }
    }

    pub fn set(&self, next: Next) {
        self.next.store(next as u8, Ordering::SeqCst);
    }

    pub fn is(&self, next: Next) -> bool {
        self.next.load(Ordering::SeqCst) == next as u8
    }

    /// The URL of the server behind, by way of this proxy.
    pub fn url(&self, direct: &str, port: u16) -> String {
        direct.replace(&format!(":{port}/"), &format!(":{}/", self.port))
    }
}

async fn forward(mut client: TcpStream, port: u16, next: Arc<AtomicU8>) {
    let is = |wanted: Next| next.load(Ordering::SeqCst) == wanted as u8;
    if is(Next::Closed) {
        return;
    }
    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut reads_only = false;
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Ok(read @ 1..) = read else { return };
                let message = &from_client[..read];
                let says = |words: &[u8]| message.windows(words.len()).any(|window| window == words);
                if says(b"BEGIN") {
                    reads_only = says(b"READ ONLY\0");
                }
                let commits = says(b"COMMIT\0") && !reads_only;
                if commits && is(Next::LoseCommit) {
                    next.store(Next::Pass as u8, Ordering::SeqCst);
                    return;
                }
                if server.write_all(message).await.is_err() {
                    return;
                }
                if commits && (is(Next::LoseReply) || is(Next::LoseReplyAndAll)) {
                    // The reply tells that the commit is done.
                    assert!(server.read(&mut from_server).await.unwrap() > 0);
                    let then = if is(Next::LoseReply) { Next::Pass } else { Next::Closed };
                    next.store(then as u8, Ordering::SeqCst);
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                let Ok(read @ 1..) = read else { return };
                if client.write_all(&from_server[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}
