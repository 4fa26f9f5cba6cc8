//! The first promise: raw data stay. Values that nothing else holds are planted in the samples of an edge, then everything
//! that an edge says or hands over is searched for them, in every form in which a number can be written down.
//!
//! The moments of a block are no samples, so the search alone would not miss the noise. The second half of the test
//! holds the released values against the exact clipped sum: without noise, or with less than was charged, it fails.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_edge::config::DetectionSettings;
use theriac_edge::detect::{Lane, LaneShared};
use theriac_edge::metrics::Metrics;
use theriac_edge::status::Board;
use theriac_edge::update::{Release, Releaser, message_of};
use theriac_model::detector::Provenance;
use theriac_model::global::{GlobalModel, delta_layout, gradient_layout};
use theriac_model::moments::{BLOCK_CLIP_NORM, BLOCK_ROWS, public_values, solve};
use theriac_model::sample::Sample;
use theriac_model::series::Series;
use theriac_privacy::ledger::Ledger;
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_protocol::codec::{encode_to_aggregator, encode_to_edge};
use theriac_protocol::compress::{decode_range, encode_f32};
use theriac_protocol::message::{AnnounceV1, ModelV1, ToAggregator, ToEdge, UpdateKind};
use theriac_protocol::units::{Digest, ModelVersion, NoiseMultiplier, Round, Timestamp};

use crate::honest;

const STEP: Duration = Duration::from_secs(1);
const BLOCKS: usize = 6;
/// 2001-09-09T01:47:00Z, a whole minute.
const START_MS: u64 = 1_000_000_020_000;

/// A number that nothing else holds, and all the ways in which it could be written down.
struct Marker {
    name: String,
    forms: Vec<Vec<u8>>,
}

impl Marker {
    fn new(name: String, value: f32) -> Self {
        let wide = f64::from(value);
        let mut forms: Vec<Vec<u8>> = vec![
            value.to_le_bytes().to_vec(),
            value.to_be_bytes().to_vec(),
            wide.to_le_bytes().to_vec(),
            wide.to_be_bytes().to_vec(),
        ];
        let mantissa = |text: String| text.split('e').next().unwrap().to_owned();
        for text in [
            format!("{value}"),
            format!("{wide}"),
            mantissa(format!("{value:e}")),
            format!("{value:.5}"),
        ] {
            assert!(
                text.len() >= 6,
                "`{text}` is too short to be told from other numbers"
            );
            forms.push(text.into_bytes());
        }
        Self { name, forms }
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        self.forms
            .iter()
            .any(|form| bytes.windows(form.len()).any(|window| window == form))
    }
}

/// What leaves, by name.
#[derive(Default)]
struct Outside(Vec<(String, Vec<u8>)>);

impl Outside {
    fn add(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        assert!(!bytes.is_empty(), "{name} is empty: nothing was searched");
        self.0.push((name.to_owned(), bytes));
    }

    fn folder(&mut self, folder: &std::path::Path) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "lock") {
                self.add(&path.display().to_string(), std::fs::read(&path).unwrap());
            }
        }
    }

    fn must_not_hold(&self, markers: &[Marker]) {
        for (name, bytes) in &self.0 {
            for marker in markers {
                assert!(!marker.is_in(bytes), "{} left the node in: {name}", marker.name);
            }
        }
    }
}

/// Everything that is logged, at every level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Samples of which every sixteenth row is all markers, and the markers: raw, and as the public scaler sees them.
fn samples() -> (Vec<Sample>, Vec<Marker>) {
    let schema = honest::schema();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut within = |spread: f32| -> Vec<f32> {
        let value = |feature: &theriac_model::feature::Feature| {
            // Inside the feature's usual range, with a mantissa that nobody would write.
            let scaled = feature.location + feature.scale * spread * (rng.random::<f32>() + 0.1);
            if feature.transform == theriac_model::feature::Transform::Log1p {
                scaled.exp_m1()
            } else {
                scaled
            }
        };
        schema.features.iter().map(value).collect()
    };
    let planted = within(1.0);
    let rows = BLOCKS * BLOCK_ROWS + 5;
    let sample = |row: usize| {
        let values = if row.is_multiple_of(16) {
            planted.clone()
        } else {
            within(1.0)
        };
        Sample {
            at_ms: START_MS + row as u64 * 1000,
            values,
        }
    };
    let samples = (0..rows).map(sample).collect();
    let scaled = public_values(&schema, &Series::new(schema.channels(), planted.clone()).unwrap());
    let mut markers = Vec::new();
    for ((feature, raw), scaled) in schema.features.iter().zip(&planted).zip(&scaled) {
        markers.push(Marker::new(format!("a sample of {}", feature.name), *raw));
        markers.push(Marker::new(
            format!("a scaled sample of {}", feature.name),
            *scaled,
        ));
    }
    (samples, markers)
}

/// The sum of the block vectors, each clipped, in plain floats: what must never leave.
fn exact_sum(samples: &[Sample]) -> Vec<f64> {
    let series = Series::from_samples(16, &samples[..BLOCKS * BLOCK_ROWS]).unwrap();
    let mut sum = vec![0.0; 320];
    for block in honest::block_vectors(&series) {
        let norm = block.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let factor = (BLOCK_CLIP_NORM / norm).min(1.0);
        sum.iter_mut()
            .zip(block)
            .for_each(|(sum, v)| *sum += f64::from(v) * factor);
    }
    sum
}

/// When all blocks are over.
fn after_the_last() -> Timestamp {
    Timestamp(START_MS + (BLOCKS * BLOCK_ROWS + 5) as u64 * 1000)
}

fn announce(round: u64, kind: UpdateKind) -> AnnounceV1 {
    let terms = honest::terms();
    let moments = AnnounceV1 {
        round: Round(round),
        nonce: round * 7,
        kind,
        values: terms.values,
        layout_digest: terms.layout_digest,
        base_version: ModelVersion(0),
        base_digest: Digest([1; 32]),
        clip_norm: terms.clip_norm,
        noise_multiplier: terms.noise_multiplier,
        block_rows: terms.block_rows,
        blocks_min: 1,
        blocks_max: 64,
        deadline_ms: 10_000,
    };
    match kind {
        UpdateKind::Moments => moments,
        UpdateKind::Gradient => {
            let layout = gradient_layout(16);
            AnnounceV1 {
                values: u32::try_from(layout.len()).unwrap(),
                layout_digest: Digest(layout.digest()),
                noise_multiplier: NoiseMultiplier::new(5.69).unwrap(),
                ..moments
            }
        }
        UpdateKind::Delta => {
            let layout = delta_layout(16);
            AnnounceV1 {
                values: u32::try_from(layout.len()).unwrap(),
                layout_digest: Digest(layout.digest()),
                noise_multiplier: NoiseMultiplier::new(20.0).unwrap(),
                ..moments
            }
        }
    }
}

#[test]
fn no_planted_value_leaves_the_node_and_what_leaves_is_noised() {
    let (samples, mut markers) = samples();
    let exact = exact_sum(&samples);
    for (index, value) in exact
        .iter()
        .enumerate()
        .filter(|(_, value)| value.abs() > 1.0)
        .take(32)
    {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the form in which an update would hold it"
        )]
        markers.push(Marker::new(format!("the exact sum {index}"), *value as f32));
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let (outside, released) = tracing::subscriber::with_default(subscriber, || live(&samples));
    let mut outside = outside;
    tracing::info!("the log is searched even when nothing was said");
    outside.add("log", [log.0.lock().unwrap().as_slice(), b"end of log"].concat());
    outside.must_not_hold(&markers);

    // The noise has standard deviation σC on each of the 352 sums: the distance is σC√352, give or take 4 %.
    let distance = released
        .iter()
        .zip(&exact)
        .map(|(a, b)| (f64::from(*a) - b).powi(2))
        .sum::<f64>()
        .sqrt();
    let expected = 1.27 * BLOCK_CLIP_NORM * 352_f64.sqrt();
    assert!(
        (0.7..1.3).contains(&(distance / expected)),
        "noise of {distance}, {expected} was charged"
    );
}

/// The life of an edge: detect, release every kind of update, take a model. Gives all that it said, and the released sums.
fn live(samples: &[Sample]) -> (Outside, Vec<f32>) {
    let mut outside = Outside::default();
    let schema = honest::schema();
    let folder = tempfile::tempdir().unwrap();
    let site = honest::node("site-a");
    let text = "site = 'site-a'\nepsilon = 8.0\nblock = '1m'\nmechanisms = ['moments', 'delta', 'gradient']\nblock_releases_max = 2\n";
    let policy = Policy::parse(text).unwrap();
    let ledger = Ledger::open(&folder.path().join("ledger.log"), &site, policy, Timestamp(1)).unwrap();

    // Detection: verdicts, the page's JSON and the metrics.
    let lane = LaneShared::new("kv", schema.clone(), 10_000, &DetectionSettings::default(), STEP);
    let lane = Arc::new(lane.started_at(Timestamp(START_MS), 10_000));
    let mut watched = Lane::new(lane.clone(), DetectionSettings::default(), STEP);
    let board = Board::new(site.as_str(), 300);
    for sample in samples {
        let verdict = watched.push(sample.clone(), false);
        board.update(|status| {
            (status.score, status.threshold) = (Some(verdict.score), Some(verdict.threshold));
        });
        outside.add("verdict", format!("{verdict:?} {sample:?}"));
    }
    outside.add("status", serde_json::to_vec(&board.status()).unwrap());
    outside.add("metrics", Metrics::new().encode().unwrap());
    outside.add("debug", format!("{:?}", lane.history()));

    // Learning: charge, read, clip, noise, compress, encode.
    let mut releaser =
        Releaser::new(ledger, lane, STEP, 2, Box::new(ExactGaussian), None).with_clock(after_the_last);
    let base = GlobalModel::initial(schema.channels(), 1);
    let mut released = vec![0.0; 320];
    let kinds = [UpdateKind::Moments, UpdateKind::Delta, UpdateKind::Gradient];
    for (round, kind) in (1..).zip(kinds) {
        let Release::Fresh { row, id } = releaser.release(&announce(round, kind), &base).unwrap() else {
            panic!("charged before")
        };
        releaser.mark_released(id, row.payload_digest).unwrap();
        let message = message_of(&row).unwrap();
        let encoded = encode_to_aggregator(&message).unwrap();
        outside.add("outbox", row.body.to_vec());
        outside.add("frame", [encoded.head, encoded.payload].concat());
        outside.add("message", format!("{message:?}"));
        if let (ToAggregator::Update(header, payload), UpdateKind::Moments) = (message, kind) {
            decode_range(header.encoding, &payload, 0, &mut released);
        }
    }
    let blocks: u64 = releaser
        .ledger()
        .charged_blocks()
        .iter()
        .map(|run| run.end() - run.start() + 1)
        .sum();
    assert_eq!(blocks, BLOCKS as u64, "all blocks were released");
    outside.add(
        "privacy status",
        serde_json::to_vec(&releaser.ledger().status()).unwrap(),
    );
    outside.add("privacy status, text", releaser.ledger().status().to_string());
    outside.add("ledger", format!("{:?}", releaser.ledger()));
    outside.add("releaser", format!("{:?}", releaser.ledger().spent()));
    drop(releaser);
    outside.folder(folder.path());

    // What the centre makes of it goes to everybody.
    let weights = solve(&released, 1, 1.27, BLOCK_CLIP_NORM, schema.channels());
    let model = base.with_own_lag(&weights).unwrap();
    let payload = encode_f32(model.values());
    let header = ModelV1 {
        version: ModelVersion(1),
        round: Round(1),
        layout_digest: Digest(model.layout().digest()),
        values: u32::try_from(model.values().len()).unwrap(),
        payload_digest: Digest::of(&payload),
        rule: "mean".to_owned(),
        contributors: 1,
    };
    let encoded = encode_to_edge(&ToEdge::Model(header, payload.into())).unwrap();
    outside.add("model frame", [encoded.head, encoded.payload].concat());
    let files = tempfile::tempdir().unwrap();
    model
        .save(files.path(), "global", &schema, &Provenance::default())
        .unwrap();
    outside.folder(files.path());
    (outside, released)
}

/// The search itself: every form in every disguise is found, and a frame without noise is caught.
#[test]
fn the_search_finds_a_value_in_every_form_and_in_an_unprotected_update() {
    let (samples, markers) = samples();
    let raw = samples[0].values[3];
    let caught = |bytes: &[u8]| markers.iter().any(|marker| marker.is_in(bytes));
    let wide = f64::from(raw);
    let surrounded = |form: &[u8]| [b"before".as_slice(), form, b"after"].concat();
    for form in [
        raw.to_le_bytes().to_vec(),
        raw.to_be_bytes().to_vec(),
        wide.to_le_bytes().to_vec(),
        wide.to_be_bytes().to_vec(),
        format!("{raw}").into_bytes(),
        format!("{raw:?}").into_bytes(),
        format!("{wide:.12}").into_bytes(),
        format!("{wide:e}").into_bytes(),
        serde_json::to_vec(&serde_json::json!({ "value": raw })).unwrap(),
        encode_f32(&samples[0].values),
    ] {
        assert!(caught(&surrounded(&form)), "{form:02x?} was not found");
    }
    assert!(!caught(b"0.5 0.25 1.0"));
    let exact = exact_sum(&samples);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the form in which an update would hold it"
    )]
    let naked: Vec<f32> = exact.iter().map(|value| *value as f32).collect();
    let sum = Marker::new("the exact sum".to_owned(), naked[0]);
    assert!(
        sum.is_in(&encode_f32(&naked)),
        "an update without noise was not found"
    );
}
