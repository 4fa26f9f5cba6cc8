//! A store whose rounds are opened, filled, combined and published by hand, as the driver does it.

use std::collections::BTreeMap;

use theriac_aggregator::accumulate::Accumulate;
use theriac_aggregator::combine::{RoundInputs, RoundResult, RowSource, Which};
use theriac_aggregator::config::{CheckedConfig, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::evidence::{Decision, RULE_VERSION, Record};
use theriac_aggregator::publish::PublishError;
use theriac_aggregator::replay::{ReplayError, replay};
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::server_optimizer::ServerOptimizer;
use theriac_aggregator::spill::RoundMemory;
use theriac_aggregator::store::evidence::{self, Conclusion, RoundPlan};
use theriac_aggregator::store::models::{self, ModelRow};
use theriac_aggregator::store::rounds::{self, RoundRule};
use theriac_aggregator::store::{Database, StoreError, late, wall_clock};
use theriac_aggregator::{InitOptions, enrol_directly, init};
use theriac_audit::checkpoint::LogKey;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding, UpdateV1};
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{Digest, L2Norm, NodeId, Round};

use super::node;

/// What a site sends in a round; the same again for the same site and round.
pub(crate) type Values = fn(&Hand, &str, u64) -> Vec<f32>;

/// A federation whose rounds are driven by hand.
pub(crate) struct Hand {
    temporary: tempfile::TempDir,
    pub(crate) config: CheckedConfig,
    pub(crate) database: Database,
    pub(crate) plan: RoundPlan,
    pub(crate) clip: L2Norm,
    pub(crate) memory: RoundMemory,
    sites: &'static [&'static str],
    values: Values,
    ledger: u64,
}

impl Hand {
    /// With the rule `mean` and f = 0; nothing is averaged or added over rounds.
    pub(crate) fn new(rounds: RoundSettings, sites: &'static [&'static str], values: Values) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        let settings = Settings {
            federation: "demo".into(),
            rounds: RoundSettings {
                rule: RuleName::MEAN,
                byzantine: 0,
                quorum: 1,
                ..rounds
            },
            ..Settings::default()
        };
        let made = init(InitOptions {
            settings,
            ..InitOptions::new(&dir, "demo")
        })
        .unwrap();
        let nodes: Vec<NodeId> = sites.iter().map(|name| node(name)).collect();
        enrol_directly(&dir, &nodes).unwrap();
        let config = made.checked;
        Self {
            temporary,
            database: Database::open(&DataDir::new(&dir)).unwrap(),
            plan: RoundPlan {
                rule: RuleName::MEAN,
                byzantine: 0,
                quarantine: config.quarantine,
                optimizer: ServerOptimizer::default(),
                rule_version: RULE_VERSION,
                central_noise: false,
                late_updates: true,
                site_average: theriac_aggregator::average::SiteAverage::OFF,
                accumulate: Accumulate::OFF,
            },
            clip: config.rounds.clip_norm,
            memory: RoundMemory::unbounded(),
            config,
            sites,
            values,
            ledger: 0,
        }
    }

    /// Most bytes of a round's rows in memory.
    pub(crate) fn memory_of(&self, bytes: u64) -> RoundMemory {
        RoundMemory::new(bytes, self.temporary.path().join("data/spill"))
    }

    pub(crate) fn terms(&self) -> RoundTerms {
        let rounds = &self.config.rounds;
        let layout = self.config.model.update(rounds.kind).unwrap();
        RoundTerms {
            kind: rounds.kind,
            values: layout.values,
            layout_digest: layout.digest,
            clip_norm: self.clip,
            noise_multiplier: rounds.noise_multiplier,
            block_rows: rounds.block_rows,
            blocks_min: rounds.blocks_min,
            blocks_max: rounds.blocks_max,
        }
    }

    pub(crate) fn open(&mut self, round: u64) -> AnnounceV1 {
        let base = models::current_model(self.database.read()).unwrap();
        let terms = self.terms();
        let announce = AnnounceV1 {
            round: Round(round),
            nonce: round,
            kind: terms.kind,
            values: terms.values,
            layout_digest: terms.layout_digest,
            base_version: base.version,
            base_digest: base.digest,
            clip_norm: terms.clip_norm,
            noise_multiplier: terms.noise_multiplier,
            block_rows: terms.block_rows,
            blocks_min: terms.blocks_min,
            blocks_max: terms.blocks_max,
            deadline_ms: 60_000,
        };
        let rule = RoundRule {
            rule: RuleName::MEAN,
            byzantine: 0,
            quorum: 1,
        };
        let cohort: Vec<NodeId> = self.sites.iter().map(|name| node(name)).collect();
        self.database
            .write(|work| rounds::open(work, &announce, &cohort, rule))
            .unwrap();
        announce
    }

    pub(crate) fn values(&self, site: &str, round: u64) -> Vec<f32> {
        (self.values)(self, site, round)
    }

    pub(crate) fn header(&mut self, announce: &AnnounceV1, payload: &[u8]) -> UpdateV1 {
        self.ledger += 1;
        super::header(announce, payload, self.ledger)
    }

    pub(crate) fn send(&mut self, announce: &AnnounceV1, site: &str) {
        let values = self.values(site, announce.round.0);
        self.send_values(announce, site, &values);
    }

    pub(crate) fn send_values(&mut self, announce: &AnnounceV1, site: &str, values: &[f32]) {
        let payload = encode_f32(values);
        let header = self.header(announce, &payload);
        self.insert(site, &header, &payload);
    }

    /// As an edge sends it that saves bytes.
    pub(crate) fn send_encoded(
        &mut self,
        announce: &AnnounceV1,
        site: &str,
        encoding: Encoding,
        payload: &[u8],
    ) {
        let header = UpdateV1 {
            encoding,
            ..self.header(announce, payload)
        };
        self.insert(site, &header, payload);
    }

    pub(crate) fn insert(&mut self, site: &str, header: &UpdateV1, payload: &[u8]) {
        self.database
            .blobs()
            .put(&header.payload_digest, payload)
            .unwrap();
        self.database
            .write(|work| rounds::insert_upload(work, &node(site), header, payload, 1.0, RuleName::MEAN))
            .unwrap();
    }

    pub(crate) fn send_late(&mut self, announce: &AnnounceV1, site: &str) -> UpdateV1 {
        let payload = encode_f32(&self.values(site, announce.round.0));
        let header = self.header(announce, &payload);
        self.database
            .blobs()
            .put(&header.payload_digest, &payload)
            .unwrap();
        let insert = |database: &mut Database| {
            database.write(|work| late::insert(work, &node(site), &header, &payload, 1.0, RuleName::MEAN))
        };
        let stored = insert(&mut self.database).unwrap();
        assert_eq!(insert(&mut self.database).unwrap(), stored, "the same again");
        let found = rounds::stored_upload(self.database.read(), announce.round, &node(site)).unwrap();
        assert_eq!(found, Some(stored), "its receipt can be given again");
        header
    }

    /// What the driver reads of a round.
    pub(crate) fn inputs(&self, round: u64, memory: &RoundMemory) -> Result<RoundInputs, StoreError> {
        let earned = evidence::reputations(self.database.read()).unwrap();
        RoundInputs::load(
            self.source(memory),
            Round(round),
            self.plan.clone(),
            &earned,
            &mut BTreeMap::new(),
            Which::Waiting,
        )
    }

    fn source<'a>(&'a self, memory: &'a RoundMemory) -> RowSource<'a> {
        RowSource {
            connection: self.database.read(),
            blobs: self.database.blobs(),
            memory,
        }
    }

    /// As the driver computes it.
    pub(crate) fn combined(&self, round: u64, memory: &RoundMemory) -> Result<RoundResult, PublishError> {
        self.inputs(round, memory).unwrap().run(&self.config.model, None)
    }

    pub(crate) fn computed(&self, round: u64) -> (ModelRow, RoundResult) {
        let base = models::current_model(self.database.read()).unwrap().version;
        let result = self.combined(round, &self.memory).unwrap();
        let row = ModelRow {
            version: base.next(),
            round: Round(round),
            layout_digest: result.candidate.layout_digest,
            values: result.candidate.values,
            digest: result.candidate.digest,
            rule: self.plan.rule.to_string(),
            contributors: 3,
            rolled_back_to: None,
            released: wall_clock(),
        };
        (row, result)
    }

    /// Publishes in one transaction, as the driver does; `fail`: something goes wrong at its end.
    pub(crate) fn written(&mut self, round: u64, fail: bool) -> Result<(), StoreError> {
        let (row, RoundResult { candidate, account }) = self.computed(round);
        self.database
            .blobs()
            .put(&candidate.digest, &candidate.payload)
            .unwrap();
        let counted = account
            .rows
            .iter()
            .filter(|row| row.decision == Decision::Combined);
        let members: Vec<(NodeId, Digest)> = counted
            .map(|row| (row.node.clone(), row.payload_digest))
            .collect();
        assert_eq!(
            members.len(),
            candidate.evidence.len(),
            "evidence is of the round's own rows"
        );
        let conclusion = Conclusion {
            plan: self.plan.clone(),
            account,
            memory: None,
        };
        self.database.write(|work| {
            rounds::publish(work, &row, &candidate.payload, &members, &candidate.evidence)?;
            evidence::conclude_round(work, Round(round), conclusion.clone())?;
            if fail {
                return Err(StoreError::Full("for the test".into()));
            }
            Ok(())
        })
    }

    pub(crate) fn publish(&mut self, round: u64) -> Vec<Record> {
        self.written(round, false).unwrap();
        evidence::of_round(self.database.read(), Round(round)).unwrap()
    }

    /// Opens a round, lets these sites send, publishes.
    pub(crate) fn round(&mut self, round: u64, sites: &[&str]) -> Vec<Record> {
        let announce = self.open(round);
        for site in sites {
            self.send(&announce, site);
        }
        self.publish(round)
    }

    pub(crate) fn replay(&self, round: u64) -> Result<usize, ReplayError> {
        self.replay_in(round, &self.memory)
    }

    pub(crate) fn replay_in(&self, round: u64, memory: &RoundMemory) -> Result<usize, ReplayError> {
        let key = LogKey::from_seed("theriac/demo", &[7; 32]).unwrap().public();
        let done = replay(self.source(memory), &self.config.model, &key, Round(round));
        done.map(|done| done.combined)
    }
}
