//! A way to a server that can be cut for one process alone.

use std::sync::Arc;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// Passes bytes on until it is cut: then open connections end, and new ones end at once. Ends when dropped.
pub struct Proxy {
    pub port: u16,
    passes: Arc<watch::Sender<bool>>,
}

impl Proxy {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let passes = Arc::new(watch::Sender::new(true));
        let mut ends = passes.subscribe();
        tokio::spawn(async move {
            loop {
                let mut client = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap().0,
                    changed = ends.changed() => if changed.is_err() { return } else { continue },
                };
                let mut passing = ends.clone();
                tokio::spawn(async move {
                    if !*passing.borrow_and_update() {
                        return;
                    }
                    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    tokio::select! {
                        // However it ends, both sides see their connection end.
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        _ = passing.changed() => {}
                    }
                });
            }
        });
        Self { port: own, passes }
    }

    pub fn cut(&self) {
        self.passes.send_replace(false);
    }

    pub fn mend(&self) {
        self.passes.send_replace(true);
    }
}
