//! Where Redis is: one server, a Sentinel group or a cluster, read strictly from a URL.
//!
//! | form | leads to |
//! |---|---|
//! | `redis://user:password@host:6379/0` | one server |
//! | `unix:///run/redis.sock?db=0` | one server on this machine |
//! | `redis-sentinel://user:password@h1:26379,h2:26379/name?db=0` | the master that the Sentinels call `name` |
//! | `redis-cluster://user:password@h1:6379,h2:6379` | every master of the cluster that these nodes belong to |
//!
//! `rediss://`, `rediss-sentinel://` and `rediss-cluster://` are the same over TLS; Valkey's names work too.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::error::QueueError;

/// Port of a server that names none.
const SERVER_PORT: u16 = 6379;
/// Port of a Sentinel that names none.
const SENTINEL_PORT: u16 = 26379;
const SCHEMES: &str =
    "allowed are redis://, redis-sentinel:// and redis-cluster://, each with rediss for TLS, and unix://";

/// What is needed besides the URL; the same for the queue's and the cache's Redis. `Debug` shows no password.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// `FLOTILLA_REDIS_CA`: PEM file of the only certificate authorities to trust, for TLS (default: the system's).
    pub ca: Option<PathBuf>,
    /// `FLOTILLA_REDIS_CERT`: PEM file of our own certificate chain, for servers that ask for one.
    pub certificate: Option<PathBuf>,
    /// `FLOTILLA_REDIS_KEY`: PEM file of the key of our certificate.
    pub key: Option<PathBuf>,
    /// `FLOTILLA_REDIS_SENTINEL_USERNAME`: who we are for the Sentinels; they have users of their own.
    pub sentinel_username: Option<String>,
    /// `FLOTILLA_REDIS_SENTINEL_PASSWORD`: the Sentinels' password. Without it they are asked without one.
    pub sentinel_password: Option<String>,
}

impl Access {
    /// Reads the variables from any source of settings.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name| get(name).filter(|value| !value.is_empty());
        Self {
            ca: get("FLOTILLA_REDIS_CA").map(PathBuf::from),
            certificate: get("FLOTILLA_REDIS_CERT").map(PathBuf::from),
            key: get("FLOTILLA_REDIS_KEY").map(PathBuf::from),
            sentinel_username: get("FLOTILLA_REDIS_SENTINEL_USERNAME"),
            sentinel_password: get("FLOTILLA_REDIS_SENTINEL_PASSWORD"),
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("ca", &self.ca)
            .field("certificate", &self.certificate)
            .field("key", &self.key)
            .field("sentinel_username", &self.sentinel_username)
            .field("sentinel_password", &self.sentinel_password.as_ref().map(|_| "***"))
            .finish()
    }
}

/// A host name or IP address, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host {
    /// Name or address, an IPv6 address without its brackets.
    pub name: String,
    /// TCP port.
    pub port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            write!(f, "[{}]:{}", self.name, self.port)
        } else {
            write!(f, "{}:{}", self.name, self.port)
        }
    }
}

/// How the servers are arranged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Topology {
    /// One server.
    Server(Host),
    /// One server behind a Unix socket.
    Socket(PathBuf),
    /// Whichever server the Sentinels call the master.
    Sentinel {
        /// Whom to ask.
        sentinels: Vec<Host>,
        /// The name under which they watch it.
        master: String,
    },
    /// A cluster: the slots are spread over several masters.
    Cluster {
        /// Nodes to begin with; the others are learnt from them.
        seeds: Vec<Host>,
    },
}

/// A URL that was understood. `Debug` shows no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    /// The servers.
    pub topology: Topology,
    /// Whether to speak TLS with them.
    pub tls: bool,
    /// The ACL user; `None`: the default user.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// The database; a cluster has only 0.
    pub db: i64,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Address")
            .field("topology", &self.topology)
            .field("tls", &self.tls)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("db", &self.db)
            .finish()
    }
}

impl Address {
    /// Reads the value of `setting`. [`QueueError::Config`] names the setting, the value without its password, and
    /// what is allowed.
    pub fn parse(setting: &'static str, url: &str) -> Result<Self, QueueError> {
        read(url.trim()).map_err(|allowed| QueueError::Config { setting, value: redacted(url), allowed })
    }
}

/// The URL for people: without its password and its query.
pub fn redacted(url: &str) -> String {
    let Some((scheme, rest)) = url.trim().split_once("://") else { return "(not a URL)".to_owned() };
    let (place, query) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
    // An @ behind a ? may be part of a password that was not written as it should be.
    if query.contains('@') {
        return format!("{scheme}://***");
    }
    match place.rsplit_once('@') {
        None => format!("{scheme}://{place}"),
        Some((account, place)) => match account.split_once(':') {
            Some((user, _)) => format!("{scheme}://{user}:***@{place}"),
            None => format!("{scheme}://***@{place}"),
        },
    }
}

fn read(url: &str) -> Result<Address, &'static str> {
    let (scheme, rest) = url.split_once("://").ok_or(SCHEMES)?;
    let scheme = scheme.to_ascii_lowercase().replacen("valkey", "redis", 1);
    let (tls, kind) = match scheme.as_str() {
        "unix" | "redis+unix" => (false, "unix"),
        other => match (other.strip_prefix("rediss"), other.strip_prefix("redis")) {
            (Some(kind), _) => (true, kind),
            (None, Some(kind)) => (false, kind),
            (None, None) => return Err(SCHEMES),
        },
    };
    if rest.contains('#') {
        return Err(
            "nothing may follow a #: certificates are always checked (a # in a password is written %23)",
        );
    }
    let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    if tail.contains('@') {
        return Err("in a user name or password / is written %2F, ? %3F and @ %40");
    }
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    let (account, hosts) = match authority.rsplit_once('@') {
        Some((account, hosts)) => (Some(account), hosts),
        None => (None, authority),
    };
    let (username, password) = account.map_or(Ok((None, None)), credentials)?;
    let mut db = database(query)?;
    let path = path.strip_prefix('/').unwrap_or(path);
    let topology = match kind {
        "unix" if hosts.is_empty() && !path.is_empty() => {
            Topology::Socket(Path::new("/").join(decoded(path)?))
        }
        "unix" => return Err("a Unix socket is written unix:///path/to/redis.sock"),
        "" => {
            let mut hosts = list(hosts, SERVER_PORT)?;
            if hosts.len() > 1 {
                return Err("several hosts need redis-sentinel:// or redis-cluster://");
            }
            if !path.is_empty() {
                db = Some(number(path)?);
            }
            Topology::Server(hosts.remove(0))
        }
        "-sentinel" => {
            let master = decoded(path)?;
            if master.is_empty() || master.contains('/') {
                return Err(
                    "the name of the master must follow the hosts: redis-sentinel://host:26379/NAME?db=0",
                );
            }
            Topology::Sentinel { sentinels: list(hosts, SENTINEL_PORT)?, master }
        }
        "-cluster" => {
            if !matches!(path, "" | "0") || db.is_some_and(|db| db != 0) {
                return Err("a cluster has database 0 only");
            }
            Topology::Cluster { seeds: list(hosts, SERVER_PORT)? }
        }
        _ => return Err(SCHEMES),
    };
    Ok(Address { topology, tls, username, password, db: db.unwrap_or(0) })
}

/// `user:password`, `:password`; percent-encoded.
fn credentials(account: &str) -> Result<(Option<String>, Option<String>), &'static str> {
    let (user, password) =
        account.split_once(':').ok_or("a user name needs a password: user:password@ or :password@")?;
    let (user, password) = (decoded(user)?, decoded(password)?);
    if password.is_empty() {
        return Err("the password is empty");
    }
    Ok(((!user.is_empty()).then_some(user), Some(password)))
}

fn list(hosts: &str, port: u16) -> Result<Vec<Host>, &'static str> {
    hosts.split(',').map(|text| host(text, port)).collect()
}

fn host(text: &str, default: u16) -> Result<Host, &'static str> {
    let (name, port) = if let Some(rest) = text.strip_prefix('[') {
        let (name, port) = rest.split_once(']').ok_or("an IPv6 address ends with ]")?;
        (name, if port.is_empty() { None } else { Some(port.strip_prefix(':').unwrap_or("?")) })
    } else {
        match text.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        }
    };
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err("each host is a name or an address, perhaps with a port: host:6379, [::1]:6379");
    }
    let port = match port {
        None => default,
        Some(port) => match u16::from_str(port) {
            Ok(port) if port > 0 => port,
            _ => return Err("a port is a number from 1 to 65535; an IPv6 address stands in [ ]"),
        },
    };
    Ok(Host { name: name.to_owned(), port })
}

fn database(query: &str) -> Result<Option<i64>, &'static str> {
    let mut db = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("db", value)) => db = Some(number(value)?),
            _ => return Err("after the ? only db=NUMBER is allowed"),
        }
    }
    Ok(db)
}

fn number(text: &str) -> Result<i64, &'static str> {
    text.parse::<u16>().map(i64::from).map_err(|_| "the database is a number, 0 if left out")
}

/// Undoes percent-encoding.
fn decoded(text: &str) -> Result<String, &'static str> {
    const WRONG: &str = "a % must be followed by two hexadecimal digits (a % itself is written %25)";
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16)).ok_or(WRONG);
            bytes.push((digit()? * 16 + digit()?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| "what is percent-encoded must be UTF-8")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(name: &str, port: u16) -> Host {
        Host { name: name.to_owned(), port }
    }

    fn parse(url: &str) -> Result<Address, QueueError> {
        Address::parse("REDIS_QUEUE_URL", url)
    }

    #[test]
    fn every_form_is_understood() {
        let one = parse("redis://127.0.0.1").unwrap();
        assert_eq!(one.topology, Topology::Server(at("127.0.0.1", 6379)));
        assert_eq!((one.tls, one.username, one.password, one.db), (false, None, None, 0));
        let one = parse("rediss://me:p%40ss%2F%25@[::1]:7000/3").unwrap();
        assert_eq!(one.topology, Topology::Server(at("::1", 7000)));
        assert_eq!((one.tls, one.db), (true, 3));
        assert_eq!((one.username.as_deref(), one.password.as_deref()), (Some("me"), Some("p@ss/%")));
        let watched = parse("redis-sentinel://:secret@a,b:26380/main?db=2").unwrap();
        let sentinels = vec![at("a", 26379), at("b", 26380)];
        assert_eq!(watched.topology, Topology::Sentinel { sentinels, master: "main".to_owned() });
        assert_eq!((watched.db, watched.password.as_deref()), (2, Some("secret")));
        assert!(parse("rediss-sentinel://a/main").unwrap().tls);
        let spread = parse("rediss-cluster://u:p@a:1,b:2/").unwrap();
        assert_eq!(spread.topology, Topology::Cluster { seeds: vec![at("a", 1), at("b", 2)] });
        assert!(spread.tls);
        assert!(!parse("redis-cluster://a").unwrap().tls);
        assert_eq!(parse("valkeys://h").unwrap(), parse("rediss://h").unwrap());
        let socket = parse("unix://:p@/run/redis.sock?db=1").unwrap();
        assert_eq!((socket.topology, socket.db), (Topology::Socket("/run/redis.sock".into()), 1));
    }

    #[test]
    fn a_bad_url_is_refused_with_the_setting_the_value_and_what_is_allowed_but_no_password() {
        for (url, shown, allowed) in [
            ("localhost:6379", "(not a URL)", "redis://"),
            ("http://u:secret@h", "http://u:***@h", "redis-cluster://"),
            ("redis-ring://h", "redis-ring://h", "redis-sentinel://"),
            ("redis://h1,h2", "redis://h1,h2", "several hosts"),
            ("redis://h/x", "redis://h/x", "database is a number"),
            ("redis://h:0", "redis://h:0", "1 to 65535"),
            ("redis://:secret@h:port", "redis://:***@h:port", "1 to 65535"),
            ("redis://", "redis://", "each host"),
            ("redis://::1:6379", "redis://::1:6379", "each host"),
            ("rediss://:secret@h/#insecure", "rediss://:***@h/", "always checked"),
            ("redis://:sec#ret@h", "redis://***", "%23"),
            ("redis://:sec/ret@h", "redis://:***@h", "%2F"),
            ("redis://:sec?ret@h", "redis://***", "%3F"),
            ("redis://:%zz-secret@h", "redis://:***@h", "two hexadecimal digits"),
            ("redis://secret@h", "redis://***@h", "needs a password"),
            ("redis://me:@h", "redis://me:***@h", "empty"),
            ("redis://h?password=secret", "redis://h", "only db=NUMBER"),
            ("redis-sentinel://:secret@h1,h2", "redis-sentinel://:***@h1,h2", "name of the master"),
            ("redis-sentinel://h1,/main", "redis-sentinel://h1,/main", "each host"),
            ("redis-cluster://h/1", "redis-cluster://h/1", "database 0 only"),
            ("redis-cluster://h?db=4", "redis-cluster://h", "database 0 only"),
            ("unix://h/run/x", "unix://h/run/x", "unix:///path"),
        ] {
            let error = parse(url).unwrap_err().to_string();
            let wanted = format!("REDIS_QUEUE_URL is {shown:?}: ");
            assert!(error.starts_with(&wanted) && error.contains(allowed), "{url}: {error}");
            assert!(!error.contains("secret") && !error.contains("ret@"), "{url}: {error}");
        }
    }

    #[test]
    fn no_password_is_shown_by_debug() {
        let address = parse("redis://me:hidden@h").unwrap();
        let access = Access { sentinel_password: Some("hidden".to_owned()), ..Access::default() };
        let shown = format!("{address:?} {access:?}");
        assert!(shown.contains("***") && !shown.contains("hidden"), "{shown}");
    }
}
