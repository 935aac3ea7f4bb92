//! Opens connections to the servers that an address leads to. Sets no deadlines: the caller bounds each call.

use std::sync::Arc;

use futures::{StreamExt, stream::FuturesUnordered};
use redis::{
    AsyncConnectionConfig, RedisConnectionInfo,
    aio::{MultiplexedConnection, PubSub},
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

pub use crate::address::Topology;
use crate::{
    address::{Access, Address, Host},
    error::QueueError,
};

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Opens connections to one address. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    setting: &'static str,
    address: Arc<Address>,
    tls: Option<TlsConnector>,
    sentinel: RedisConnectionInfo,
}

/// An open connection. Clones share it; its task ends when the last clone is dropped, also when the server hangs.
#[derive(Clone)]
pub struct Wire {
    /// For commands.
    pub redis: MultiplexedConnection,
    _driver: Arc<AbortOnDropHandle<()>>,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl Dialer {
    /// Reads the URL, the value of `setting`, and for TLS the certificate files. Opens no connection. Fails with
    /// [`QueueError::Config`].
    pub fn new(setting: &'static str, url: &str, access: &Access) -> Result<Self, QueueError> {
        let address = Address::parse(setting, url)?;
        let tls = if address.tls { Some(crate::tls::client_config(access)?.into()) } else { None };
        let mut sentinel = RedisConnectionInfo::default().set_skip_set_lib_name();
        if let Some(password) = &access.sentinel_password {
            sentinel = sentinel.set_password(password);
            if let Some(username) = &access.sentinel_username {
                sentinel = sentinel.set_username(username);
            }
        }
        Ok(Self { setting, address: Arc::new(address), tls, sentinel })
    }

    /// What the URL says.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connects to the server, or to the master that the Sentinels name. A cluster has no one server to connect to.
    pub async fn connect(&self) -> Result<Wire, QueueError> {
        match &self.address.topology {
            Topology::Server(host) => self.connect_to(host).await,
            Topology::Socket(_) => Self::wire(self.socket().await?, &self.login()).await,
            Topology::Sentinel { sentinels, master } => Ok(self.master(sentinels, master).await?.1),
            Topology::Cluster { .. } => Err(self.cluster()),
        }
    }

    /// Connects to one server by name, for example to a node of the cluster.
    pub(crate) async fn connect_to(&self, host: &Host) -> Result<Wire, QueueError> {
        Self::wire(self.stream(host).await?, &self.login()).await.map_err(|error| at(host, error))
    }

    /// Opens a connection for wake-ups to the server or the master.
    pub(crate) async fn subscribe(&self) -> Result<PubSub, QueueError> {
        match &self.address.topology {
            Topology::Server(host) => self.subscribe_at(host).await,
            Topology::Socket(_) => Ok(PubSub::new(&self.login(), self.socket().await?).await?),
            Topology::Sentinel { sentinels, master } => {
                let (host, _) = self.master(sentinels, master).await?;
                self.subscribe_at(&host).await
            }
            Topology::Cluster { .. } => Err(self.cluster()),
        }
    }

    pub(crate) async fn subscribe_at(&self, host: &Host) -> Result<PubSub, QueueError> {
        Ok(PubSub::new(&self.login(), self.stream(host).await?).await?)
    }

    /// The server that the Sentinels call the master and that agrees. All are asked side by side, because one may hang.
    async fn master(&self, sentinels: &[Host], name: &str) -> Result<(Host, Wire), QueueError> {
        let mut attempts: FuturesUnordered<_> =
            sentinels.iter().map(|sentinel| self.master_by(sentinel, name)).collect();
        let (mut problems, mut unknown) = (Vec::new(), 0);
        while let Some(attempt) = attempts.next().await {
            match attempt {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => unknown += 1,
                Err(error) => problems.push(bare(error)),
            }
        }
        if unknown == sentinels.len() {
            return Err(QueueError::Config {
                setting: self.setting,
                value: name.to_owned(),
                allowed: "a name under which the Sentinels watch a master must follow the hosts",
            });
        }
        if unknown > 0 {
            problems.push(format!("{unknown} Sentinels know no master {name:?}"));
        }
        Err(QueueError::Unavailable(format!("no master {name:?} by the Sentinels: {}", problems.join("; "))))
    }

    /// As one Sentinel sees it; `None` if it knows no such name.
    async fn master_by(&self, sentinel: &Host, name: &str) -> Result<Option<(Host, Wire)>, QueueError> {
        let mut asked = Self::wire(self.stream(sentinel).await?, &self.sentinel)
            .await
            .map_err(|error| at(sentinel, error))?;
        let answer: Option<(String, u16)> = redis::cmd("SENTINEL")
            .arg("get-master-addr-by-name")
            .arg(name)
            .query_async(&mut asked.redis)
            .await
            .map_err(|error| at(sentinel, error.into()))?;
        let Some((name, port)) = answer else { return Ok(None) };
        let host = Host { name, port };
        let mut wire = self.connect_to(&host).await?;
        let info: String = redis::cmd("INFO").arg("replication").query_async(&mut wire.redis).await?;
        // Sentinels learn of a failover one after the other, and a master that was away becomes a replica when it is back.
        match crate::link::info(&info, "role") {
            Some("master") => Ok(Some((host, wire))),
            role => {
                let role = role.unwrap_or("unknown");
                Err(QueueError::Unavailable(format!(
                    "{sentinel} calls {host} the master, whose role is {role}"
                )))
            }
        }
    }

    async fn wire<S: Stream + 'static>(stream: S, login: &RedisConnectionInfo) -> Result<Wire, QueueError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(1024);
        let (redis, driver) = MultiplexedConnection::new_with_config(login, stream, config).await?;
        Ok(Wire { redis, _driver: Arc::new(AbortOnDropHandle::new(tokio::spawn(driver))) })
    }

    async fn stream(&self, host: &Host) -> Result<Box<dyn Stream>, QueueError> {
        let failed = |error: std::io::Error| QueueError::Unavailable(format!("{host}: {error}"));
        let tcp = TcpStream::connect((host.name.as_str(), host.port)).await.map_err(failed)?;
        // Commands are small and wanted at once.
        tcp.set_nodelay(true).map_err(failed)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(tcp)) };
        let name = ServerName::try_from(host.name.clone())
            .map_err(|error| QueueError::Unavailable(format!("{host}: no name for TLS: {error}")))?;
        let tls = tls
            .connect(name, tcp)
            .await
            .map_err(|error| QueueError::Unavailable(format!("{host}: TLS: {error}")))?;
        Ok(Box::new(tls))
    }

    async fn socket(&self) -> Result<UnixStream, QueueError> {
        let Topology::Socket(path) = &self.address.topology else { return Err(self.cluster()) };
        UnixStream::connect(path)
            .await
            .map_err(|error| QueueError::Unavailable(format!("{}: {error}", path.display())))
    }

    fn login(&self) -> RedisConnectionInfo {
        let mut login = RedisConnectionInfo::default().set_skip_set_lib_name().set_db(self.address.db);
        if let Some(password) = &self.address.password {
            login = login.set_password(password);
            if let Some(username) = &self.address.username {
                login = login.set_username(username);
            }
        }
        login
    }

    fn cluster(&self) -> QueueError {
        QueueError::Config {
            setting: self.setting,
            value: "a cluster".to_owned(),
            allowed: "redis://, rediss://, redis-sentinel:// or rediss-sentinel:// is needed here",
        }
    }
}

/// Says which server an error is about.
fn at(host: &Host, error: QueueError) -> QueueError {
    match error {
        QueueError::Unavailable(text) => QueueError::Unavailable(format!("{host}: {text}")),
        QueueError::Protocol(text) => QueueError::Protocol(format!("{host}: {text}")),
        other => other,
    }
}

/// The error without the words that come before it when it is shown.
fn bare(error: QueueError) -> String {
    match error {
        QueueError::Unavailable(text) | QueueError::Protocol(text) => text,
        other => other.to_string(),
    }
}
