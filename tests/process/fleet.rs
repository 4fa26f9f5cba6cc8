//! An aggregator and edges as their operators have them: directories, configuration files, processes.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use theriac_aggregator::config::{LimitSettings, ModelSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::publish::next_model;
use theriac_aggregator::robust::{Options, RuleName, rule};
use theriac_aggregator::status::Status as CentreStatus;
use theriac_aggregator::store::rounds::{self as stored, RoundDetail};
use theriac_aggregator::store::{Database, records};
use theriac_aggregator::{InitOptions, init};
use theriac_edge::status::{Federation, IncidentView, Status};
use theriac_privacy::policy::signed::{PolicyKey, signature_path};
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{ModelVersion, Round};

use crate::child::{Ended, PROGRAM, Running, command, free_address, run, text, until};
use crate::page;

/// Values of the model of [`Centre::bare`].
pub(crate) const DIMENSION: u32 = 4;

/// Samples of a block, and the length of a block at one sample in 100 ms.
pub(crate) const BLOCK_ROWS: u32 = 11;
pub(crate) const BLOCK: &str = "1100ms";

/// Rounds of moments that short-lived edges can take part in.
pub(crate) fn moments(more: &str) -> String {
    format!(
        "[rounds]\nkind = \"moments\"\nblock_rows = {BLOCK_ROWS}\nblocks_min = 1\nblocks_max = 4\nclip_norm = 100.0\n{more}\n"
    )
}

/// An aggregator.
pub(crate) struct Centre {
    pub(crate) dir: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) join: SocketAddr,
    pub(crate) page: SocketAddr,
    /// The join line that `init` printed.
    pub(crate) join_line: String,
    log: PathBuf,
    running: Option<Running>,
}

impl Centre {
    /// `init`, then the configuration with these sections. The first token is for `press-1`.
    pub(crate) fn init(root: &Path, sections: &str) -> Self {
        let dir = root.join("centre");
        let [listen, join, page] = [free_address(), free_address(), free_address()];
        let made = run(
            "aggregator",
            &[
                "init",
                "--dir",
                text(&dir),
                "--federation",
                "plant",
                "--hosts",
                "127.0.0.1,localhost",
                "--listen",
                &listen.to_string(),
                "--join-listen",
                &join.to_string(),
                "--http",
                &page.to_string(),
                "--site",
                "press-1",
                "--format",
                "json",
            ],
        )
        .expect_done()
        .json();
        let centre = Self {
            log: root.join("centre.log"),
            join_line: made["join"].as_str().unwrap().to_owned(),
            dir,
            listen,
            join,
            page,
            running: None,
        };
        centre.configure(sections);
        centre
    }

    /// In `dir`, for a model of four bare numbers, whose rounds clients without data can take part in.
    pub(crate) fn bare(root: &Path, dir: &Path, rounds: RoundSettings) -> Self {
        let rounds = RoundSettings {
            kind: RoundKind::Delta,
            rule: RuleName::MEAN,
            clip_norm: Some(10.0),
            noise_multiplier: Some(1.0),
            ..rounds
        };
        let limits = LimitSettings {
            rounds_kept: 1_000_000,
            ..LimitSettings::default()
        };
        Self::of(
            root,
            dir,
            Settings {
                rounds,
                limits,
                model: ModelSettings {
                    dimension: Some(DIMENSION),
                    ..ModelSettings::default()
                },
                ..Settings::default()
            },
        )
    }

    /// In `dir`, with these settings and addresses of its own.
    pub(crate) fn of(root: &Path, dir: &Path, settings: Settings) -> Self {
        let [listen, join, page] = [free_address(), free_address(), free_address()];
        let settings = Settings {
            federation: "plant".to_owned(),
            listen,
            join_listen: join,
            http: page,
            ..settings
        };
        let options = InitOptions {
            settings,
            ..InitOptions::new(dir, "plant")
        };
        let made = init(options).unwrap();
        Self {
            log: root.join("centre.log"),
            join_line: made.join_line().unwrap(),
            dir: dir.to_owned(),
            listen,
            join,
            page,
            running: None,
        }
    }

    /// What the rule makes, here and now, of the stored base model and the stored updates of a round.
    pub(crate) fn recomputed(&self, round: Round) -> Bytes {
        let config = theriac_aggregator::config::load(&self.config(), []).unwrap();
        let (rounds, layout) = (&config.rounds, config.model.update(config.rounds.kind).unwrap());
        let terms = RoundTerms {
            kind: rounds.kind,
            values: layout.values,
            layout_digest: layout.digest,
            clip_norm: rounds.clip_norm,
            noise_multiplier: rounds.noise_multiplier,
            block_rows: rounds.block_rows,
            blocks_min: rounds.blocks_min,
            blocks_max: rounds.blocks_max,
        };
        let database = self.database();
        let (read, blobs) = (database.read(), database.blobs());
        let detail = stored::detail(read, round).unwrap();
        let rows = detail
            .uploads
            .iter()
            .map(|upload| stored::upload_row(read, blobs, round, &upload.node.parse().unwrap()).unwrap())
            .collect();
        let base = records::model_payload(read, blobs, ModelVersion(detail.round.base_version)).unwrap();
        let rule = rule(rounds.rule, rounds.byzantine, &Options::default()).unwrap();
        next_model(&config.model, &terms, &base, rows, &*rule)
            .unwrap()
            .payload
    }

    /// The values of a published model as they are served.
    pub(crate) fn published(&self, version: u64) -> Bytes {
        let database = self.database();
        records::model_payload(database.read(), database.blobs(), ModelVersion(version)).unwrap()
    }

    /// The record of a round.
    pub(crate) fn round(&self, round: u64) -> RoundDetail {
        stored::detail(self.database().read(), Round(round)).unwrap()
    }

    /// Writes the configuration: addresses, and these sections.
    pub(crate) fn configure(&self, sections: &str) {
        let Self {
            listen, join, page, ..
        } = self;
        let text = format!(
            "federation = \"plant\"\nlisten = \"{listen}\"\njoin_listen = \"{join}\"\nhttp = \"{page}\"\n\
             advertise = \"{listen}\"\n{sections}\n"
        );
        fs::write(self.config(), text).unwrap();
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("aggregator.toml")
    }

    /// Starts it and waits until it answers.
    pub(crate) fn serve(&mut self) {
        assert!(self.running.is_none(), "it runs already");
        let command = command("aggregator", &["serve", "--config", text(&self.config())]);
        let mut running = Running::start("aggregator", command, &self.log);
        until("the aggregator to answer", || {
            running.must_run();
            page::is_well(self.page).then_some(())
        });
        self.running = Some(running);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.as_ref().unwrap().pid()
    }

    pub(crate) fn kill(&mut self) {
        self.running.take().unwrap().kill();
    }

    pub(crate) fn stop(&mut self) {
        assert_eq!(self.running.take().unwrap().stop(), Some(0));
    }

    /// A command on this data directory.
    pub(crate) fn run(&self, words: &[&str]) -> Ended {
        let config = self.config();
        run("aggregator", &[words, &["--config", text(&config)]].concat())
    }

    /// A fresh token.
    pub(crate) fn token(&self, site: &str, ttl: &str) -> String {
        let made = self
            .run(&[
                "token", "create", "--site", site, "--ttl", ttl, "--format", "json",
            ])
            .expect_done()
            .json();
        made["token"].as_str().unwrap().to_owned()
    }

    /// What the running server's page says.
    pub(crate) fn status(&self) -> CentreStatus {
        until("the aggregator's status", || page::json(self.page, "/status"))
    }

    /// Waits until the page says so.
    pub(crate) fn until(&mut self, what: &str, ready: impl Fn(&CentreStatus) -> bool) -> CentreStatus {
        until(what, || {
            if let Some(running) = &mut self.running {
                running.must_run();
            }
            page::json(self.page, "/status").filter(|status| ready(status))
        })
    }

    pub(crate) fn database(&self) -> Database {
        Database::open(&DataDir::new(&self.dir)).unwrap()
    }
}

/// An edge.
pub(crate) struct Edge {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) page: SocketAddr,
    config: PathBuf,
    log: PathBuf,
    running: Option<Running>,
}

impl Edge {
    /// Quick settings and a privacy policy to match. `more` goes to the end of the configuration.
    pub(crate) fn new(root: &Path, name: &str, more: &str) -> Self {
        Self::on(root, name, root, "", more)
    }

    /// The same with more keys in the privacy policy.
    pub(crate) fn under(root: &Path, name: &str, policy: &str) -> Self {
        Self::made(root, name, root, ("", ""), policy)
    }

    /// The same with its state on `disk` and more keys in `[federation]`.
    pub(crate) fn on(root: &Path, name: &str, disk: &Path, federation: &str, more: &str) -> Self {
        Self::made(root, name, disk, (federation, more), "")
    }

    fn made(root: &Path, name: &str, disk: &Path, (federation, more): (&str, &str), promise: &str) -> Self {
        let edge = Self {
            name: name.to_owned(),
            dir: disk.join(name),
            page: free_address(),
            config: root.join(format!("{name}.toml")),
            log: root.join(format!("{name}.log")),
            running: None,
        };
        let policy = root.join(format!("{name}.privacy.toml"));
        let terms = format!(
            "site = \"{name}\"\nblock = \"{BLOCK}\"\nepsilon = 8\ndelta = 1e-6\nnoise_multiplier_min = 0.7\n{promise}\n"
        );
        fs::write(&policy, &terms).unwrap();
        let officer = PolicyKey::from_seed(&rand::random());
        let signature = officer.sign(&terms).unwrap().to_string();
        fs::write(signature_path(&policy), signature).unwrap();
        let officer = officer.public();
        let text = format!(
            "state_dir = \"{}\"\n[sampling]\ninterval = \"100ms\"\nhistory_rows = 600\n\
             [detection]\nwarm_up_rows = 60\nfit_rows = 60\n[http]\nlisten = \"{}\"\n\
             [healing]\nautonomy = \"act\"\nrestore_autonomy = \"act\"\ncooldown = \"200ms\"\nmax_actions = 1000\nsettle = \"0s\"\nanomaly_confirm = 600\n\
             [healing_budget]\nmax_actions = 1000\n\
             [federation]\nretry_base = \"50ms\"\nretry_max = \"300ms\"\nprivacy_policy = \"{}\"\npolicy_key = \"{officer}\"\n{federation}\n{more}\n",
            edge.dir.display(),
            edge.page,
            policy.display(),
        );
        fs::write(&edge.config, text).unwrap();
        edge
    }

    /// Changes its configuration, for its next start.
    pub(crate) fn reconfigure(&self, from: &str, to: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&self.config, text.replace(from, to)).unwrap();
    }

    /// A command on this edge's configuration.
    pub(crate) fn run(&self, words: &[&str]) -> Ended {
        run("edge", &[words, &["--config", text(&self.config)]].concat())
    }

    /// `join`, not yet judged.
    pub(crate) fn join(&self, centre: &Centre, token: &str) -> Ended {
        let join = centre.join.to_string();
        self.run(&["join", "--aggregator", &join, "--token", token])
    }

    /// Enrols it with a fresh token.
    pub(crate) fn enrol(&self, centre: &Centre) {
        self.join(centre, &centre.token(&self.name, "1h")).expect_done();
    }

    /// Starts it and waits until its page answers and shows its services.
    pub(crate) fn start(&mut self) {
        assert!(self.running.is_none(), "it runs already");
        let services = fs::read_to_string(&self.config)
            .unwrap()
            .matches("[[service]]")
            .count();
        let command = command("edge", &["run", "--config", text(&self.config)]);
        let mut running = Running::start(&self.name, command, &self.log);
        until("the edge's page", || {
            running.must_run();
            page::json::<Status>(self.page, "/status").filter(|status| status.services.len() >= services)
        });
        self.running = Some(running);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.as_ref().unwrap().pid()
    }

    pub(crate) fn kill(&mut self) {
        self.running.take().unwrap().kill();
    }

    pub(crate) fn stop(&mut self) {
        assert_eq!(self.running.take().unwrap().stop(), Some(0));
    }

    /// Waits until its page says so.
    pub(crate) fn until(&mut self, what: &str, ready: impl Fn(&Status) -> bool) -> Status {
        let (page, name) = (self.page, &self.name);
        until(&format!("{name}: {what}"), || {
            if let Some(running) = &mut self.running {
                running.must_run();
            }
            page::json(page, "/status").filter(|status| ready(status))
        })
    }

    pub(crate) fn until_connected(&mut self) {
        self.until("connected", |status| status.federation == Federation::Connected);
    }

    /// Waits for so many samples; enough of them hold complete blocks.
    pub(crate) fn until_rows(&mut self, rows: u64) {
        self.until("enough samples", |status| status.rows >= rows);
    }

    pub(crate) fn incidents(&self) -> Vec<IncidentView> {
        until("the edge's incidents", || page::json(self.page, "/incidents"))
    }

    /// The bytes of its privacy ledger.
    pub(crate) fn ledger(&self) -> Vec<u8> {
        fs::read(self.dir.join("ledger.log")).unwrap()
    }

    /// `privacy status`.
    pub(crate) fn privacy(&self) -> serde_json::Value {
        self.run(&["privacy", "status", "--format", "json"])
            .expect_done()
            .json()
    }
}

/// The `[[service]]` of an edge: the lab's key-value service.
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    pub(crate) state: PathBuf,
}

impl Service {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            address: free_address(),
            state: root.join("kv"),
        }
    }

    /// For the end of `edge.toml`.
    pub(crate) fn table(&self, checkpoint_every: &str) -> String {
        let (test, at, state) = (std::process::id(), self.address, self.state.display());
        format!(
            "[[service]]\nname = \"kv\"\n\
             argv = [\"{PROGRAM}\", \"{test}\", \"service\", \"--listen\", \"{at}\", \"--state\", \"{state}\"]\n\
             stop_grace = \"1s\"\n\
             [service.probe]\nurl = \"http://{at}/healthz\"\ninterval = \"100ms\"\ntimeout = \"10s\"\n\
             [service.state]\ndir = \"{state}\"\ninterval = \"{checkpoint_every}\"\nkeep = 3\n\
             check = [\"{PROGRAM}\", \"{test}\", \"service\", \"check\", \"--state\", \"{{state}}\"]\n"
        )
    }

    pub(crate) fn put(&self, key: &str, value: &str) {
        let path = format!("/kv/{key}");
        until("a write to be acknowledged", || {
            page::ask("PUT", self.address, &path, value.as_bytes()).filter(|(code, _)| *code == 204)
        });
    }

    pub(crate) fn get(&self, key: &str) -> Option<String> {
        let (code, body) = page::ask("GET", self.address, &format!("/kv/{key}"), b"")?;
        (code == 200).then(|| String::from_utf8(body).unwrap())
    }

    /// Processes that serve this state, whoever started them.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let state = text(&self.state);
        let serves = |pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            words.contains(&state.as_bytes()) && words.contains(&b"--listen".as_slice())
        };
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| serves(*pid))
            .collect()
    }

    pub(crate) fn kill(&self) {
        for pid in self.processes() {
            kill(pid);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

/// kill −9 of a process that is not our child; one that is gone is fine.
fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
}
