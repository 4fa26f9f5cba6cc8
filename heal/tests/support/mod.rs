//! A PostgreSQL cluster of a test's own: made by `initdb -N`, on a Unix socket in a short temporary folder, as an account that is
//! not root, ended by its process id.

#![expect(dead_code, reason = "each test binary uses the parts that it needs")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use theriac_heal::background::Background;
use theriac_heal::checkpoint::postgres::workload::Criteria;
use theriac_heal::checkpoint::postgres::{PostgresSource, ShadowSpec};
use theriac_heal::checkpoint::store::{CheckpointStore, StoreLimits};
use theriac_heal::postgres::binaries::PgBinaries;
use theriac_heal::postgres::owner::Owner;
use theriac_heal::postgres::session::{Session, Target};

/// One running server.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) binaries: PgBinaries,
    pub(crate) owner: Owner,
    pub(crate) target: Target,
    server: Option<Child>,
}

impl Cluster {
    /// Makes and starts one, with page checksums if asked.
    pub(crate) fn start(checksums: bool, settings: &[&str]) -> Self {
        let mut cluster = Self::made(checksums, settings);
        cluster.begin();
        cluster
    }

    /// Starts the server, again if need be, and waits until it answers.
    pub(crate) fn begin(&mut self) {
        self.server = Some(self.spawn());
        self.ready();
    }

    pub(crate) fn made(checksums: bool, settings: &[&str]) -> Self {
        let binaries = PgBinaries::find_here().unwrap_or_else(|missing| panic!("{missing}"));
        let dir = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp").unwrap();
        let owner = account();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        owner.take(dir.path()).unwrap();
        let data = dir.path().join("data");
        let mut initdb = command(&binaries.tool("initdb"), owner);
        initdb.args([
            "-N",
            "-A",
            "trust",
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
            "-D",
        ]);
        initdb.arg(&data);
        if checksums {
            initdb.arg("--data-checksums");
        }
        let made = initdb.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let socket = dir.path().join("s");
        std::fs::create_dir(&socket).unwrap();
        owner.take(&socket).unwrap();
        let mut conf = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nport = 5432\nfsync = off\nshared_buffers = 32MB\nlog_line_prefix = ''\n",
            socket.display()
        );
        for line in settings {
            conf.push_str(line);
            conf.push('\n');
        }
        let path = data.join("postgresql.conf");
        let before = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, before + &conf).unwrap();
        let target = Target {
            socket_dir: socket,
            port: 5432,
            user: "postgres".to_owned(),
            database: "postgres".to_owned(),
        };
        Self {
            dir,
            binaries,
            owner,
            target,
            server: None,
        }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn argv(&self) -> Vec<String> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        vec![
            text(&self.binaries.tool("postgres")),
            "-D".to_owned(),
            text(&self.data()),
        ]
    }

    fn spawn(&self) -> Child {
        let argv = self.argv();
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        let mut server = command(Path::new(&argv[0]), self.owner);
        server.args(&argv[1..]).stdout(Stdio::null()).stderr(log);
        server.spawn().unwrap()
    }

    pub(crate) fn ready(&self) {
        let begun = Instant::now();
        while self.run_psql("select 1").is_err() {
            assert!(
                begun.elapsed() < Duration::from_mins(1),
                "{}",
                std::fs::read_to_string(self.dir.path().join("log")).unwrap()
            );
            std::thread::yield_now();
        }
    }

    /// One statement through `psql`; its output, or what it said.
    pub(crate) fn run_psql(&self, sql: &str) -> Result<String, String> {
        let mut psql = command(&self.binaries.tool("psql"), self.owner);
        let out = psql
            .args([
                "-X",
                "-q",
                "-A",
                "-t",
                "-v",
                "ON_ERROR_STOP=1",
                "-U",
                "postgres",
                "-h",
            ])
            .arg(&self.target.socket_dir)
            .args(["-c", sql])
            .output()
            .unwrap();
        if out.status.success() {
            Ok(String::from_utf8(out.stdout).unwrap().trim().to_owned())
        } else {
            Err(String::from_utf8_lossy(&out.stderr).into_owned())
        }
    }

    pub(crate) fn psql(&self, sql: &str) -> String {
        self.run_psql(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// `pgbench`'s tables, and an invariant over them.
    pub(crate) fn fill(&self, scale: u32) -> PathBuf {
        let mut bench = command(&self.binaries.tool("pgbench"), self.owner);
        let out = bench
            .args(["-i", "-q", "-s", &scale.to_string(), "-U", "postgres", "-h"])
            .arg(&self.target.socket_dir)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let path = self.dir.path().join("balances.sql");
        std::fs::write(&path, BALANCES).unwrap();
        path
    }

    /// A running `pgbench`.
    pub(crate) fn pgbench(&self, arguments: &[&str]) -> Child {
        // SIGINT, by which alone pgbench ends well, is ignored by what a shell runs in the background, and by its children.
        let mut bench = command(Path::new("/usr/bin/env"), self.owner);
        bench
            .arg("--default-signal=INT")
            .arg(self.binaries.tool("pgbench"))
            .args(["-n", "-U", "postgres", "-h"])
            .arg(&self.target.socket_dir)
            .args(arguments);
        bench.stdout(Stdio::null()).stderr(Stdio::null());
        bench.spawn().unwrap()
    }

    pub(crate) async fn session(&self) -> Session {
        Session::open(&self.target, Some(self.owner), Duration::from_secs(30))
            .await
            .unwrap()
    }

    pub(crate) fn store(&self, keep: usize) -> CheckpointStore {
        self.store_named("checkpoints", keep)
    }

    pub(crate) fn store_named(&self, name: &str, keep: usize) -> CheckpointStore {
        let limits = StoreLimits {
            keep,
            free_bytes_min: 1 << 20,
            ..StoreLimits::default()
        };
        CheckpointStore::open(&self.dir.path().join(name), limits).unwrap()
    }

    pub(crate) fn source(&self, invariants: Vec<PathBuf>) -> PostgresSource {
        PostgresSource {
            binaries: self.binaries.clone(),
            data_dir: self.data(),
            work_dir: self.dir.path().join("data.shadow"),
            target: self.target.clone(),
            max_rate_kib: None,
            backup_timeout: Duration::from_mins(2),
            background: Background::new(0, None),
            free_bytes_min: 1 << 20,
            shadow: ShadowSpec {
                invariants,
                requests: 50,
                // Nothing is about how fast a busy machine answers.
                criteria: Criteria {
                    max_p99: Duration::from_mins(1),
                    ..Criteria::default()
                },
                ..ShadowSpec::default()
            },
        }
    }

    /// Ends the server at once, as a crash does.
    pub(crate) fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let pid = rustix::process::Pid::from_child(&server);
            rustix::process::kill_process(pid, rustix::process::Signal::QUIT).unwrap();
            server.wait().unwrap();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes the server's own list agree with what is there now: sizes as they are, no checksums, no WAL asked for. So the manifest
/// check has nothing to say, as when the primary itself is damaged.
pub(crate) fn forge_manifest(data: &Path) {
    use sha2::Digest as _;
    let path = data.join("backup_manifest");
    let mut list: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let files = list["Files"].as_array_mut().unwrap();
    files.retain(|file| data.join(file["Path"].as_str().unwrap()).exists());
    for file in files {
        let found = std::fs::metadata(data.join(file["Path"].as_str().unwrap())).unwrap();
        file["Size"] = found.len().into();
        let file = file.as_object_mut().unwrap();
        file.remove("Checksum");
        file.remove("Checksum-Algorithm");
    }
    let body = format!(
        "{{ \"PostgreSQL-Backup-Manifest-Version\": {},\n\"Files\": {},\n\"WAL-Ranges\": [\n],\n",
        list["PostgreSQL-Backup-Manifest-Version"], list["Files"]
    );
    let digest = data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(body.as_bytes()));
    std::fs::write(&path, format!("{body}\"Manifest-Checksum\": \"{digest}\"}}\n")).unwrap();
}

/// Us, or where we are root the account of Debian's package, or nobody.
fn account() -> Owner {
    let own = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let (uid, gid) = if own.0 == 0 {
        named("postgres").unwrap_or((65_534, 65_534))
    } else {
        own
    };
    Owner { uid, gid }
}

fn named(name: &str) -> Option<(u32, u32)> {
    let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
    accounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.first() == Some(&name))
            .then(|| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)))?
    })
}

fn command(program: &Path, owner: Owner) -> Command {
    use std::os::unix::process::CommandExt as _;
    let mut command = Command::new(program);
    command.current_dir("/").stdin(Stdio::null());
    if owner.is_other() {
        command.gid(owner.gid).uid(owner.uid);
    }
    command
}

/// Every transaction of pgbench moves one amount through three tables and writes it down.
pub(crate) const BALANCES: &str = "select (select coalesce(sum(abalance), 0) from pgbench_accounts) = (select coalesce(sum(bbalance), 0) from pgbench_branches)
   and (select coalesce(sum(tbalance), 0) from pgbench_tellers) = (select coalesce(sum(bbalance), 0) from pgbench_branches)
   and (select coalesce(sum(delta), 0) from pgbench_history) = (select coalesce(sum(bbalance), 0) from pgbench_branches)";
