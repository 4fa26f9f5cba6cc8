//! A round from the store to its model: peak memory by where its rows are, and what earlier releases cost to read.
//!
//! `cargo bench -p theriac-benches --bench rounds -- spill --updates 2000 --values 100000 --rule trimmed_mean` measures each bound in a process of its own, whose
//! peak is the system's figure; `-- releases --sites 1000 --releases 150` reads all kept releases by one query and by one query each. Without a word both run small.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use theriac_aggregator::accumulate::{Accumulate, sum_terms};
use theriac_aggregator::average::SiteAverage;
use theriac_aggregator::combine::{RoundInputs, RowSource, Which};
use theriac_aggregator::config::{ModelSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::evidence::RULE_VERSION;
use theriac_aggregator::evidence::reputation::QuarantineLimits;
use theriac_aggregator::metrics::ProcessUse;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::spill::RoundMemory;
use theriac_aggregator::store::blob::ROW_BYTES_MAX;
use theriac_aggregator::store::evidence::RoundPlan;
use theriac_aggregator::store::rounds::{self, RoundRule};
use theriac_aggregator::store::{Database, history, models, sums};
use theriac_aggregator::{InitOptions, init};
use theriac_benches::Numbers;
use theriac_protocol::compress::{encode_f32, encode_int8};
use theriac_protocol::message::{AnnounceV1, Encoding, PrivacyClaimV1, UpdateKind, UpdateV1};
use theriac_protocol::refusal::AbortReason;
use theriac_protocol::units::{Delta, Digest, Epsilon, NodeId, Round};

type Done<T> = Result<T, Box<dyn Error>>;

/// A week: nothing of a run is older.
const AGE_MS: u64 = 7 * 86_400_000;

fn main() -> Done<()> {
    let arguments = Arguments(std::env::args().collect());
    if let Some(dir) = arguments.word("--child") {
        return combine(Path::new(dir), &arguments);
    }
    let one = ["spill", "releases"].into_iter().find(|word| arguments.has(word));
    let folder = std::env::var_os("THERIAC_BENCH_DIR").unwrap_or_else(|| ".".into());
    if one != Some("releases") {
        let folder = tempfile::tempdir_in(&folder)?;
        spill(&folder.path().join("data"), &arguments)?;
    }
    if one != Some("spill") {
        let folder = tempfile::tempdir_in(&folder)?;
        releases(&folder.path().join("data"), &arguments)?;
    }
    Ok(())
}

struct Arguments(Vec<String>);

impl Arguments {
    fn has(&self, word: &str) -> bool {
        self.0.iter().any(|argument| argument == word)
    }

    fn word(&self, name: &str) -> Option<&str> {
        let at = self.0.iter().position(|argument| argument == name)?;
        self.0.get(at + 1).map(String::as_str)
    }

    fn number(&self, name: &str, default: u64) -> Done<u64> {
        Ok(self.word(name).map_or(Ok(default), str::parse)?)
    }
}

/// Combines one round with all its rows in memory and with all of them in a file, each in a process of its own, `--repeat` times in turns.
fn spill(dir: &Path, arguments: &Arguments) -> Done<()> {
    let (updates, values) = (
        arguments.number("--updates", 50)?,
        u32::try_from(arguments.number("--values", 20_000)?)?,
    );
    let model = ModelSettings {
        dimension: Some(values),
        ..ModelSettings::default()
    };
    // Rows differ by far more than their noise, so that none is a copy.
    let mut store = Made::new(dir, RoundKind::Delta, Some(0.1), model, updates)?;
    let announce = store.open(1)?;
    let mut numbers = Numbers::new(4);
    for site in 0..updates {
        let row = numbers.signed(usize::try_from(values)?);
        let (encoding, payload) = if arguments.has("--int8") {
            encode_int8(&row, || numbers.draw())
        } else {
            (Encoding::F32, encode_f32(&row))
        };
        store.insert(&announce, &[(site, encoding, payload)])?;
    }
    drop(store);
    let width = if arguments.has("--int8") { 1 } else { 4 };
    let mib = (updates * u64::from(values) * width) >> 20;
    for _ in 0..arguments.number("--repeat", 1)? {
        for memory in ["18446744073709551615", "1073741824", "0"] {
            let rule = arguments.word("--rule").unwrap_or("trimmed_mean");
            let child = Command::new(std::env::current_exe()?)
                .arg("--child")
                .arg(dir)
                .args([
                    "--memory",
                    memory,
                    "--rule",
                    rule,
                    "--updates",
                    &updates.to_string(),
                ])
                .output()?;
            let said = String::from_utf8(child.stdout)?;
            eprintln!(
                "{updates} x {values} ({mib} MiB), {rule}, at most {memory} bytes of rows in memory: {}{}",
                said.trim(),
                String::from_utf8(child.stderr)?
            );
        }
    }
    Ok(())
}

/// In the child: the round as the driver combines it.
fn combine(dir: &Path, arguments: &Arguments) -> Done<()> {
    let dir = DataDir::new(dir);
    let rule: RuleName = arguments.word("--rule").unwrap_or("trimmed_mean").parse()?;
    let updates = arguments.number("--updates", 0)?;
    let database = Database::open(&dir)?;
    let spec = theriac_aggregator::config::load(&dir.config(), [])?.model;
    let memory = RoundMemory::new(arguments.number("--memory", 0)?, dir.spill());
    let (begun, before) = (Instant::now(), ProcessUse::now());
    let source = RowSource {
        connection: database.read(),
        blobs: database.blobs(),
        memory: &memory,
    };
    let plan = plan(rule, usize::try_from(updates / 5)?, Accumulate::OFF);
    let inputs = RoundInputs::load(
        source,
        Round(1),
        plan,
        &BTreeMap::new(),
        &mut BTreeMap::new(),
        Which::Waiting,
    )?;
    let loaded = begun.elapsed().as_secs_f64();
    let result = inputs.run(&spec, None)?;
    let used = ProcessUse::now();
    write(&format!(
        "peak {} MiB, {:.2} s ({loaded:.2} s of it reading), {:.2} s of processor, model {}",
        used.peak_resident_bytes >> 20,
        begun.elapsed().as_secs_f64(),
        used.cpu_seconds - before.cpu_seconds,
        result.candidate.digest
    ))
}

fn write(line: &str) -> Done<()> {
    use std::io::Write as _;
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

/// Reads every kept release of a round by one query and, as before there was that one, by one query each.
fn releases(dir: &Path, arguments: &Arguments) -> Done<()> {
    let (sites, kept) = (
        arguments.number("--sites", 20)?,
        u32::try_from(arguments.number("--releases", 10)?)?,
    );
    let mut store = Made::new(dir, RoundKind::Moments, None, ModelSettings::default(), sites)?;
    let mut numbers = Numbers::new(5);
    for round in 1..=u64::from(kept) {
        let announce = store.open(round)?;
        let mut rows = Vec::new();
        for site in 0..sites {
            let row = numbers.signed(usize::try_from(announce.values)?);
            let (encoding, payload) = encode_int8(&row, || numbers.draw());
            rows.push((site, encoding, payload));
        }
        store.insert(&announce, &rows)?;
        store.keep(&announce)?;
    }
    let last = store.open(u64::from(kept) + 1)?;
    let accumulate = Accumulate {
        keep: kept + 1,
        age_ms: AGE_MS,
    };
    let (read, blobs) = (store.database.read(), store.database.blobs());
    for _ in 0..arguments.number("--repeat", 3)? {
        let begun = Instant::now();
        let window = sums::Window::of(read, &last, accumulate)?;
        let mut bytes = 0;
        sums::each(read, blobs, &window, |release| {
            bytes += release.row()?.payload.len();
            Ok(())
        })?;
        let one = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let mut again = 0;
        for site in 0..sites {
            for round in 1..=kept {
                let row = rounds::upload_row(read, blobs, Round(round.into()), &name(site)?)?;
                again += row.payload.len();
            }
        }
        let each = begun.elapsed().as_secs_f64();
        assert_eq!(bytes, again, "both read every release");
        let begun = Instant::now();
        let inputs = RoundInputs::load(
            RowSource {
                connection: read,
                blobs,
                memory: &RoundMemory::unbounded(),
            },
            last.round,
            plan(RuleName::CAF, 1, accumulate),
            &BTreeMap::new(),
            &mut BTreeMap::new(),
            Which::Waiting,
        )?;
        eprintln!(
            "{sites} sites, {kept} releases each, {bytes} bytes: read by one query in {one:.3} s, by one query each in {each:.3} s; \
             {} rows of sums made in {:.3} s",
            inputs.carried.len(),
            begun.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn name(site: u64) -> Done<NodeId> {
    Ok(NodeId::new(format!("s{site:05}"))?)
}

fn plan(rule: RuleName, byzantine: usize, accumulate: Accumulate) -> RoundPlan {
    RoundPlan {
        rule,
        byzantine,
        quarantine: QuarantineLimits {
            enabled: false,
            enter_below: 0.4,
            leave_at: 0.7,
        },
        optimizer: theriac_aggregator::server_optimizer::ServerOptimizer::default(),
        rule_version: RULE_VERSION,
        central_noise: false,
        late_updates: false,
        site_average: SiteAverage::OFF,
        accumulate,
    }
}

/// A store that is filled by hand.
struct Made {
    database: Database,
    announce: AnnounceV1,
    ledger: u64,
}

impl Made {
    fn new(
        dir: &Path,
        kind: RoundKind,
        clip_norm: Option<f64>,
        model: ModelSettings,
        sites: u64,
    ) -> Done<Self> {
        let settings = Settings {
            federation: "bench".into(),
            rounds: RoundSettings {
                kind,
                clip_norm,
                ..RoundSettings::default()
            },
            model,
            ..Settings::default()
        };
        let config = init(InitOptions {
            settings,
            ..InitOptions::new(dir, "bench")
        })?
        .checked;
        let mut database = Database::open(&DataDir::new(dir))?;
        // Without keys: nobody dials.
        database.write(|work| {
            for site in 0..sites {
                let digest = Digest::of(&site.to_le_bytes());
                work.connection().execute(
                    "INSERT INTO site (node, state, key_fingerprint, enrolled_unix_ms, ledger_head, ledger_records)
                     VALUES (?1, 'active', ?2, 0, zeroblob(32), 0)",
                    (format!("s{site:05}"), digest.0),
                )?;
            }
            Ok(())
        })?;
        let kind = UpdateKind::from(kind);
        let (layout, rounds) = (config.model.update(kind)?, &config.rounds);
        let base = models::current_model(database.read())?;
        Ok(Self {
            database,
            announce: AnnounceV1 {
                round: Round(0),
                nonce: 1,
                kind,
                values: layout.values,
                layout_digest: layout.digest,
                base_version: base.version,
                base_digest: base.digest,
                clip_norm: rounds.clip_norm,
                noise_multiplier: rounds.noise_multiplier,
                block_rows: rounds.block_rows,
                blocks_min: rounds.blocks_min,
                blocks_max: rounds.blocks_max,
                deadline_ms: 60_000,
            },
            ledger: 0,
        })
    }

    /// Opens a round; the one before ends.
    fn open(&mut self, round: u64) -> Done<AnnounceV1> {
        let announce = AnnounceV1 {
            round: Round(round),
            ..self.announce.clone()
        };
        let rule = RoundRule {
            rule: RuleName::CAF,
            byzantine: 1,
            quorum: 3,
        };
        self.database.write(|work| {
            if round > 1 {
                rounds::abort(work, Round(round - 1), AbortReason::Operator)?;
            }
            rounds::open(work, &announce, &[], rule)
        })?;
        Ok(history::announced(self.database.read(), Round(round))?)
    }

    /// Updates of these sites, in one transaction.
    fn insert(&mut self, announce: &AnnounceV1, rows: &[(u64, Encoding, Vec<u8>)]) -> Done<()> {
        let mut ready = Vec::new();
        for (site, encoding, payload) in rows {
            self.ledger += 1;
            let header = UpdateV1 {
                round: announce.round,
                nonce: announce.nonce,
                kind: announce.kind,
                base_digest: announce.base_digest,
                layout_digest: announce.layout_digest,
                values: announce.values,
                encoding: *encoding,
                payload_digest: Digest::of(payload),
                blocks_bound: announce.blocks_max,
                privacy: PrivacyClaimV1 {
                    clip_norm: announce.clip_norm,
                    noise_multiplier: announce.noise_multiplier,
                    epsilon_spent: Epsilon::new(1.0)?,
                    delta: Delta::new(1e-6)?,
                    ledger_head: Digest::of(&self.ledger.to_le_bytes()),
                    ledger_records: self.ledger,
                },
            };
            if payload.len() > ROW_BYTES_MAX {
                self.database.blobs().put(&header.payload_digest, payload)?;
            }
            ready.push((name(*site)?, header, payload));
        }
        self.database.write(|work| {
            for (node, header, payload) in &ready {
                rounds::insert_upload(work, node, header, payload, 1.0, RuleName::CAF)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// As if the round had taken its updates in.
    fn keep(&mut self, announce: &AnnounceV1) -> Done<()> {
        self.database.write(|work| {
            work.connection().execute(
                "INSERT INTO kept_release (node, round, late, into_round, terms_digest, payload_digest, blocks_min, blocks_max, opened_unix_ms)
                 SELECT node, upload.round, 0, upload.round, ?2, payload_digest, 1, 60, opened_unix_ms
                 FROM upload JOIN round ON round.round = upload.round WHERE upload.round = ?1",
                (i64::try_from(announce.round.0).unwrap_or(i64::MAX), sum_terms(announce).0),
            )?;
            Ok(())
        })?;
        Ok(())
    }
}
