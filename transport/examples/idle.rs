//! What idle connections cost a server: memory, CPU and handshakes per second, with full mutual TLS.
//!
//! ```text
//! cargo run --release -p theriac-transport --example idle -- [CONNECTIONS]
//! ```
//!
//! The clients are a process of their own, so that the figures are the server's.

use std::error::Error;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use theriac_certs::{Authority, Identity, Role, files, trust};
use theriac_protocol::message::{HelloV1, PROTOCOL_MAX, PROTOCOL_MIN, ToEdge, WelcomeV1};
use theriac_protocol::units::{Digest, ModelVersion, NodeId, NoiseMultiplier, Timestamp};
use theriac_transport::{AggregatorSession, Limits, SessionError, bind_client, bind_server, connect};
use tokio::task::JoinSet;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [role, dir, addr, count] if role == "clients" => {
            clients(dir.as_ref(), addr.parse()?, count.parse()?).await
        }
        [count] => serve(count.parse()?).await,
        _ => serve(1000).await,
    }
}

async fn serve(count: usize) -> Outcome<()> {
    let dir = tempfile::tempdir()?;
    let now = SystemTime::now();
    let aggregators = Authority::generate("idle", Role::Aggregator, now)?;
    let edges = Authority::generate("idle", Role::Edge, now)?;
    files::save_certificate(&dir.path().join("aggregators.pem"), aggregators.certificate_der())?;
    edges
        .issue_edge(&NodeId::new("edge")?)?
        .save(dir.path(), "edge")?;
    let identity = aggregators.issue_aggregator(&NodeId::new("main")?, &["localhost".to_owned()])?;
    let tls = trust::server_config(&identity, edges.certificate_der())?;
    let server = bind_server("127.0.0.1:0".parse()?, tls, &Limits::default())?;
    let before = (rss_kib()?, Instant::now());

    let mut child = KillOnDrop(
        Command::new(std::env::current_exe()?)
            .args(["clients".as_ref(), dir.path().as_os_str()])
            .args([server.local_addr()?.to_string(), count.to_string()])
            .stdin(Stdio::null())
            .spawn()?,
    );
    let mut sessions = JoinSet::new();
    for _ in 0..count {
        let session = server.accept().await.ok_or("the endpoint failed")?;
        sessions.spawn(idle(session));
    }
    // The last welcomes are on their way.
    while server.traffic().frames_sent < count as u64 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (opened, opening) = (rss_kib()?, before.1.elapsed());
    let cpu = cpu_ticks()?;
    tokio::time::sleep(Duration::from_secs(30)).await;
    let idle_ticks = cpu_ticks()? - cpu;
    let told = format!(
        "{count} connections open after {opening:.2?} ({:?})\nRSS {} KiB before, {opened} KiB when all were open, {} KiB after \
         30 s idle: {:.1} KiB each\nCPU ticks (1/100 s) in 30 s idle: {idle_ticks}\nstill open: {}\n",
        server.accept_stats(),
        before.0,
        rss_kib()?,
        (rss_kib()? - before.0) as f64 / count as f64,
        server.open_connections(),
    );
    std::io::stdout().write_all(told.as_bytes())?;
    child.0.kill()?;
    Ok(())
}

async fn idle(mut session: AggregatorSession) -> Result<(), SessionError> {
    session.recv().await?;
    session.admit(4 << 20);
    let welcome = WelcomeV1 {
        protocol: PROTOCOL_MAX,
        federation: "idle".to_owned(),
        node: session
            .handle()
            .peer_name()
            .map_err(|_| SessionError::Ended)?
            .node,
        time: Timestamp(0),
        frame_bytes_max: 4 << 20,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: (0, Digest::default()),
        audit_consistency: Vec::new(),
        round: None,
    };
    session.send(&ToEdge::Welcome(welcome)).await?;
    session.recv().await.map(|_| ())
}

async fn clients(dir: &std::path::Path, addr: std::net::SocketAddr, count: usize) -> Outcome<()> {
    let tls = trust::client_config(
        &Identity::load(dir, "edge")?,
        &files::load_certificate(&dir.join("aggregators.pem"))?,
    )?;
    let endpoint = bind_client(&Limits::default())?;
    let hello = HelloV1 {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        software: "idle".to_owned(),
        features: Vec::new(),
        profile: "host-service-v1".to_owned(),
        profile_digest: Digest::default(),
        layout_digest: Digest::default(),
        noise_multiplier_min: NoiseMultiplier::new(1.0)?,
        ledger_head: Digest::default(),
        ledger_records: 0,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: None,
        receipt_missing: None,
    };
    let mut dialling = JoinSet::new();
    for _ in 0..count {
        let (endpoint, tls, hello) = (endpoint.clone(), tls.clone(), hello.clone());
        dialling.spawn(async move { connect(&endpoint, addr, "localhost", tls, hello).await });
        if dialling.len() >= 64
            && let Some(connected) = dialling.join_next().await
        {
            hold(connected??.0);
        }
    }
    while let Some(connected) = dialling.join_next().await {
        hold(connected??.0);
    }
    std::future::pending().await
}

fn hold(mut session: theriac_transport::EdgeSession) {
    tokio::spawn(async move { session.recv().await.map(|_| ()) });
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if self.0.kill().is_ok() {
            self.0.wait().ok();
        }
    }
}

fn rss_kib() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .ok_or("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).ok_or("no figure")?.parse()?)
}

/// User and system time of this process, fields 14 and 15 of proc(5) stat.
fn cpu_ticks() -> Outcome<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .ok_or("no stat")?
        .split_whitespace()
        .collect();
    Ok(fields.get(11).ok_or("no utime")?.parse::<u64>()?
        + fields.get(12).ok_or("no stime")?.parse::<u64>()?)
}
