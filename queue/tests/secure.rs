//! TLS with a private CA, and a user who may do no more than the guide says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{collections::HashSet, fs, path::PathBuf, time::Duration};

use devstack::{RedisProcess, testing::TestServices};
use queue::{
    Access, Acker, BreakerNews, BreakerReport, Claimer, ClaimerConfig, Done, Envelope, Gates, Heartbeat,
    HeartbeatConfig, Lender, Presence, Priority, Queue, QueueConfig, Reaper, Scheduler, TenantId, WorkerId,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use support::{
    Stage, eventually, job, jobs, name,
    servers::{OPTIONS, PATIENCE, patient},
    worker,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A certificate authority made for one test, and what it issued.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

impl Authority {
    fn new(dir: PathBuf) -> Self {
        fs::create_dir_all(&dir).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // A certificate that has its authority's name would count as self-signed.
        params.distinguished_name.push(DnType::CommonName, format!("authority {}", dir.display()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    /// Writes NAME.pem and NAME.key for these host names and addresses.
    fn issue(&self, name: &str, hosts: &[&str]) {
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.file(&format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn access(&self) -> Access {
        Access {
            ca: Some(self.file("ca.pem")),
            certificate: Some(self.file("client.pem")),
            key: Some(self.file("client.key")),
            ..Access::default()
        }
    }
}

async fn serve(dir: &TestServices, authority: &Authority, certificate: &str, more: &str) -> RedisProcess {
    let server = RedisProcess::reserve(&dir.dir().join(format!("server-{certificate}"))).unwrap();
    let path = |name: String| authority.file(&name).display().to_string();
    let options = format!(
        "port 0\ntls-port {}\ntls-cert-file {}\ntls-key-file {}\ntls-ca-cert-file {}\ntls-auth-clients yes\n\
         requirepass secret\n{OPTIONS}\n{more}",
        server.port(),
        path(format!("{certificate}.pem")),
        path(format!("{certificate}.key")),
        path("ca.pem".to_owned()),
    );
    server.start(&options, &[]).await.unwrap();
    server
}

async fn connected(config: &QueueConfig, server: &RedisProcess) -> Queue {
    eventually(
        PATIENCE,
        async || Queue::connect(config.clone()).await.ok(),
        async || format!("{:?}; {}", Queue::connect(config.clone()).await.err(), server.log()),
    )
    .await
}

#[tokio::test]
async fn tls_trusts_the_named_authority_and_nobody_else() {
    let dir = TestServices::builder().start().await.unwrap();
    let ours = Authority::new(dir.dir().join("ours"));
    let foreign = Authority::new(dir.dir().join("foreign"));
    for authority in [&ours, &foreign] {
        authority.issue("client", &["client"]);
    }
    ours.issue("node", &["127.0.0.1", "localhost"]);
    ours.issue("misnamed", &["elsewhere.example"]);
    let server = serve(&dir, &ours, "node", "").await;
    let config = QueueConfig {
        url: format!("rediss://:secret@127.0.0.1:{}", server.port()),
        access: ours.access(),
        ..patient()
    };
    let queue = connected(&config, &server).await;
    queue.push(&jobs(5)).await.unwrap();
    queue.ping().await.unwrap();
    assert_eq!(queue.claim(&name(), &worker(), 9).await.unwrap().len(), 5);

    let refused = async |config: QueueConfig| {
        let error = Queue::connect(config).await.unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
        error
    };
    // Not the authority that signed the server's certificate; ours for the server, so that only our check differs.
    let access = Access { ca: Some(foreign.file("ca.pem")), ..ours.access() };
    let error = refused(QueueConfig { access, ..config.clone() }).await;
    assert!(error.contains("TLS") && error.contains("UnknownIssuer"), "{error}");
    // The system's authorities don't know ours either; a machine without any says so.
    let access = Access { ca: None, ..ours.access() };
    let error = refused(QueueConfig { access, ..config.clone() }).await;
    assert!(error.contains("UnknownIssuer") || error.contains("FLOTILLA_REDIS_CA"), "{error}");
    // The server wants a certificate of the client's.
    let access = Access { certificate: None, key: None, ..ours.access() };
    refused(QueueConfig { access, ..config.clone() }).await;
    let access = Access { ca: Some(ours.file("ca.pem")), ..foreign.access() };
    refused(QueueConfig { access, ..config.clone() }).await;
    // Plain text to a TLS port.
    refused(QueueConfig { url: config.url.replace("rediss", "redis"), ..config.clone() }).await;
    // Signed by ours, but for another name.
    let misnamed = serve(&dir, &ours, "misnamed", "").await;
    let url = format!("rediss://:secret@127.0.0.1:{}", misnamed.port());
    eventually(
        PATIENCE,
        async || {
            let config = QueueConfig { url: url.clone(), ..config.clone() };
            let error = Queue::connect(config).await.unwrap_err().to_string();
            // At first nobody listens yet.
            error.contains("not valid for name").then_some(())
        },
        async || misnamed.log(),
    )
    .await;
}

#[tokio::test]
async fn a_cluster_speaks_tls_too() {
    let dir = TestServices::builder().start().await.unwrap();
    let ours = Authority::new(dir.dir().join("ours"));
    ours.issue("client", &["client"]);
    ours.issue("node", &["127.0.0.1"]);
    // A node of its own bus port; it waits for nobody.
    let spare = RedisProcess::reserve(&dir.dir().join("spare")).unwrap();
    let cluster = format!(
        "cluster-enabled yes\ntls-cluster yes\ntls-replication yes\ncluster-port {}",
        spare.second_port()
    );
    let server = serve(&dir, &ours, "node", &cluster).await;
    let plain = QueueConfig {
        url: format!("rediss://:secret@127.0.0.1:{}", server.port()),
        access: ours.access(),
        ..patient()
    };
    connected(&plain, &server).await;
    let dialer = queue::Dialer::new("TEST", &plain.url, &plain.access).unwrap();
    let mut wire = dialer.connect().await.unwrap();
    support::servers::ask(&mut wire.redis, "CLUSTER ADDSLOTSRANGE 0 16383").await.unwrap();
    let url = plain.url.replace("rediss://", "rediss-cluster://");
    let queue = connected(&QueueConfig { url, partitions: 4, ..plain }, &server).await;
    eventually(
        PATIENCE,
        async || queue.push(&jobs(1)).await.ok(),
        async || format!("{:?}", queue.push(&jobs(1)).await),
    )
    .await;
    let shutdown = CancellationToken::new();
    let heartbeat = Heartbeat::spawn(queue.config().clone(), HeartbeatConfig::default()).unwrap();
    let config = ClaimerConfig { queues: vec![name()], worker: worker(), batch: 8, slots: 8 };
    let (_claimer, mut inbox) = Claimer::spawn(queue, heartbeat, config, Gates::new(), shutdown.clone());
    tokio::time::timeout(PATIENCE, inbox.recv()).await.unwrap().unwrap();
    shutdown.cancel();
}

const GUIDE: &str = include_str!("../../docs/guides/redis.md");

/// The words of the guide's line that makes the user.
fn acl_line() -> Vec<&'static str> {
    let begin = GUIDE.find("ACL SETUSER flotilla ").expect("the guide has no ACL line");
    let text = &GUIDE[begin..];
    text[..text.find("\n```").unwrap()].split_whitespace().collect()
}

#[test]
fn the_guides_acl_line_names_every_command_that_a_script_runs() {
    let allowed: HashSet<String> =
        acl_line().iter().filter_map(|word| Some(word.strip_prefix('+')?.to_lowercase())).collect();
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/lua")).unwrap() {
        let path = entry.unwrap().path();
        for call in fs::read_to_string(&path).unwrap().split("redis.call(").skip(1) {
            // `front and 'LPUSH' or 'RPUSH'` names two.
            let first = call.split([',', ')']).next().unwrap();
            for command in first.split('\'').skip(1).step_by(2) {
                let command = command.to_lowercase();
                assert!(allowed.contains(&command), "{} uses {command}: add it to the guide", path.display());
            }
        }
    }
}

#[tokio::test]
async fn a_user_with_no_more_than_the_guides_rights_can_do_everything() {
    let stage = Stage::new().await;
    let mut raw = stage.raw().await;
    let mut line = redis::cmd("ACL");
    acl_line().iter().skip(1).for_each(|word| {
        line.arg(*word);
    });
    line.exec_async(&mut raw).await.unwrap();
    let url = stage.config.url.replace("redis://", "redis://flotilla:change-me@");
    let wrong = QueueConfig { url: url.replace("change-me", "wrong"), ..stage.config.clone() };
    let error = Queue::connect(wrong).await.unwrap_err().to_string();
    assert!(error.contains("authentication failed") && error.contains("redis.md"), "{error}");

    let lease = Duration::from_secs(5);
    let config = QueueConfig { url, partitions: 2, lease, ..stage.config.clone() };
    let queue = Queue::connect(config.clone()).await.unwrap();
    queue.ping().await.unwrap();
    queue.stamp(Uuid::now_v7()).await.unwrap();
    assert!(queue.stamped().await.unwrap());
    let mut all = jobs(60);
    all.extend((0..9).map(|n| Envelope { run_at_ms: Some(i64::MAX / 4096), ..job(&format!("t{n}"), 2) }));
    queue.push(&all).await.unwrap();
    let places: Vec<_> = all.iter().map(|envelope| (name(), envelope.id)).collect();
    let claims = queue.claim(&name(), &worker(), 30).await.unwrap();
    let leases: Vec<_> = claims.iter().map(queue::Claim::lease_ref).collect();
    queue.heartbeat(&leases).await.unwrap();
    queue.ack(&leases[..5]).await.unwrap();
    let given: Vec<_> = leases[5..9]
        .iter()
        .zip(0..)
        .map(|(lease, n)| (lease.clone(), Duration::from_secs(n % 2 * 3600)))
        .collect();
    queue.release(&given).await.unwrap();
    queue.forget(&places[..30]).await.unwrap();
    queue.push(&jobs(9)).await.unwrap();
    queue
        .reprioritise(&places.iter().map(|(q, id)| (q.clone(), *id, Priority::HIGHEST)).collect::<Vec<_>>())
        .await
        .unwrap();
    queue.missing(&places).await.unwrap();
    queue.places(&places).await.unwrap();
    queue.stats(&name()).await.unwrap();
    queue.leases(&name()).await.unwrap();
    queue.scan(&name(), 0, 0).await.unwrap();
    let mut news = queue.breaker_news(WorkerId::new("listener"), CancellationToken::new());
    assert_eq!(tokio::time::timeout(PATIENCE, news.recv()).await.unwrap(), Some(BreakerNews::Listening));
    for report in [BreakerReport::Open, BreakerReport::Look, BreakerReport::Closed] {
        queue.report_breaker(&worker(), "cache", report).await.unwrap();
    }
    for told in [BreakerNews::Opened("cache".to_owned()), BreakerNews::Closed("cache".to_owned())] {
        assert_eq!(tokio::time::timeout(PATIENCE, news.recv()).await.unwrap(), Some(told));
    }
    assert!(queue.open_breakers("cache").await.unwrap().is_empty());
    queue.tenant_depth(&name(), &TenantId::new("acme").unwrap()).await.unwrap();
    let far = queue.at(i64::MAX / 4096 + 1);
    assert!(!far.reap(&name()).await.unwrap().is_empty());
    assert!(far.promote(&name()).await.unwrap() > 0);
    redis::cmd("FLUSHALL").exec_async(&mut raw).await.unwrap();
    queue.heartbeat(&leases[20..]).await.unwrap();

    // The roles, and a wake-up without a poll to help it.
    let config = QueueConfig { safety_poll: Duration::from_secs(600), ..config };
    let queue = Queue::connect(config.clone()).await.unwrap();
    let heartbeat =
        Heartbeat::spawn(config, HeartbeatConfig { interval: Duration::from_millis(500) }).unwrap();
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let shutdown = CancellationToken::new();
    Reaper::spawn(queue.clone(), vec![name()], shutdown.clone());
    Scheduler::spawn(queue.clone(), vec![name()], shutdown.clone());
    let config = ClaimerConfig { queues: vec![name()], worker: worker(), batch: 8, slots: 8 };
    let (_claimer, mut inbox) =
        Claimer::spawn(queue.clone(), heartbeat, config, Gates::new(), shutdown.clone());
    let presence = Presence::spawn(queue.clone(), worker(), vec![name()], shutdown.clone());
    for _ in 0..5 {
        queue.push(&jobs(1)).await.unwrap();
        let job = tokio::time::timeout(PATIENCE, inbox.recv()).await.expect("no wake-up").unwrap();
        acker.done(&job.lease, Done::Ack).await;
        drop(job);
        acker.flush().await;
    }
    shutdown.cancel();
    presence.await.unwrap();
    assert_eq!(queue.rates(&name()).await.unwrap().minute.ended, 5);

    // A lender keeps its role for as long as it looks.
    let stop = CancellationToken::new();
    let lender = Lender::spawn(queue.clone(), vec![name()], stop.clone());
    let mut last = -2;
    let kept = async || {
        let mut left = redis::cmd("PTTL");
        let left: i64 = left.arg("{flotilla:ingest:lend}:role").query_async(&mut raw).await.unwrap();
        assert!(last < 0 || left > 0, "it lost its role");
        let before = std::mem::replace(&mut last, left);
        (before > 0 && left > before).then_some(())
    };
    eventually(PATIENCE, kept, async || "it never took its role again".to_owned()).await;
    stop.cancel();
    lender.await.unwrap();

    // And nothing else.
    let mut theirs = redis::Client::open(queue.config().url.as_str())
        .unwrap()
        .get_multiplexed_async_connection()
        .await
        .unwrap();
    for words in
        ["SET other 1", "GET {other:x:0}", "FLUSHALL", "KEYS *", "CONFIG SET maxmemory 1", "PUBLISH x y"]
    {
        let error = support::servers::ask(&mut theirs, words).await.unwrap_err();
        assert_eq!(error.code(), Some("NOPERM"), "{words}: {error}");
    }
}
