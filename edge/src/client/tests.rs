use theriac_model::detector::Detector;
use theriac_model::feature::FeatureSchema;
use theriac_model::global::OwnLagWeights;
use theriac_model::sample::Sample;
use theriac_privacy::ledger::Ledger;
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_protocol::message::{Appraisal, AppraisalV1, CandidateV1};
use theriac_protocol::units::{Round, Timestamp};

use super::work::Answer;
use super::*;
use crate::config::DetectionSettings;

const STEP: Duration = Duration::from_secs(1);
const CHANNELS: usize = 16;

/// A lane whose channels `moving` swing slowly with shocks and whose others rest, with a detector fitted on it.
fn lane(name: &str, moving: std::ops::Range<usize>) -> Arc<LaneShared> {
    let settings = DetectionSettings::default();
    let lane = LaneShared::new(name, FeatureSchema::host_service_v1(), 10_000, &settings, STEP)
        .started_at(Timestamp(1_000_000_020_000), 10_000);
    let mut state = 5_u32;
    let mut values = vec![0.5_f32; CHANNELS];
    for row in 0..400_u64 {
        for value in &mut values[moving.clone()] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let shock = (state >> 8) as f32 / 16_777_216.0 - 0.5;
            *value = 0.5 + 0.9 * (*value - 0.5) + 0.2 * shock;
        }
        let at_ms = 1_000_000_020_000 + row * 1000;
        let values = values.clone();
        lane.history().push(Sample { at_ms, values }, true);
    }
    let rows = lane.history().quiet(400);
    lane.replace(Arc::new(Detector::fit(&lane.schema, &rows, &lane.fit).unwrap()));
    Arc::new(lane)
}

async fn driver(root: &std::path::Path, lanes: Vec<Arc<LaneShared>>) -> Driver {
    let dir = StateDir::open(&root.join("s")).unwrap();
    let (board, metrics) = (Board::new("site-a", 300), Arc::new(Metrics::new()));
    let policy = Policy::parse("site = 'site-a'\nepsilon = 4.0\nblock = '1m'\n").unwrap();
    let node: theriac_protocol::units::NodeId = "site-a".parse().unwrap();
    let ledger = Ledger::open(&root.join("ledger.log"), &node, policy, Timestamp(1)).unwrap();
    let releaser = Releaser::new(
        ledger,
        Arc::clone(&lanes[0]),
        STEP,
        2,
        Box::new(ExactGaussian),
        None,
    );
    let client = Client {
        settings: FederationSettings::default(),
        joined: Joined {
            node,
            federation: "f".to_owned(),
            aggregator: "localhost:1".to_owned(),
        },
        lane: Arc::clone(&lanes[0]),
        lanes,
        budget: releaser.budget(),
        releaser: Arc::new(Mutex::new(releaser)),
        store: Store::open(&dir).unwrap(),
        storage: StorageWatch::new(dir.clone(), board.clone(), Arc::clone(&metrics)),
        dir,
        board,
        metrics,
        fleet: None,
    };
    Driver::new(client).await.unwrap()
}

fn arrive(driver: &mut Driver, version: u64, model: &GlobalModel) {
    let payload: Vec<u8> = model.values().iter().flat_map(|v| v.to_le_bytes()).collect();
    let header = ModelV1 {
        version: ModelVersion(version),
        round: Round(version),
        layout_digest: Digest(model_layout(CHANNELS).digest()),
        values: u32::try_from(model.values().len()).unwrap(),
        payload_digest: Digest::of(&payload),
        rule: "caf".to_owned(),
        contributors: 3,
    };
    driver.arrived = Some((header, payload.into(), Ok(Arc::new(model.clone()))));
}

/// Bad only on the first channel, which rests in one lane and is all that moves in the other.
fn poisoned() -> GlobalModel {
    let mut weights = [0.19_f32; 5].repeat(CHANNELS);
    weights[..5].fill(-0.9);
    let own = OwnLagWeights::new(CHANNELS, weights).unwrap();
    GlobalModel::initial(CHANNELS, 1).with_own_lag(&own).unwrap()
}

async fn judged(driver: &mut Driver) {
    let answer = next_answer(&mut driver.training, &mut driver.judging, &mut driver.appraising).await;
    assert!(matches!(answer, Answer::Judged { .. }));
    assert_eq!(
        driver.answered(answer),
        None,
        "the aggregator hears nothing of it"
    );
}

#[tokio::test]
async fn a_model_is_judged_on_every_lanes_own_rows_and_leant_on_only_where_it_passed() {
    let root = tempfile::tempdir().unwrap();
    let lanes = vec![lane("web", 1..CHANNELS), lane("db", 0..1)];
    let mut driver = driver(root.path(), lanes.clone()).await;
    arrive(&mut driver, 1, &poisoned());
    let version = ModelVersion(1);
    assert_eq!(driver.hold(version), Some(Input::Held { version }));
    judged(&mut driver).await;
    let uses = |lane: &LaneShared| lane.detector().unwrap().provenance().model_version;
    assert_eq!((uses(&lanes[0]), uses(&lanes[1])), (1, 0));
    assert!(lanes[0].global().is_some() && lanes[1].global().is_none());
    let status = driver.client.board.status();
    assert_eq!(status.gate, "web: accepted, db: worse_on_tail");
    let reason = status.gate_reason.unwrap();
    assert!(
        reason.starts_with("web: model 1: as it came") && reason.contains("; db: model 1: as it came"),
        "{reason}"
    );
    assert!(driver.unjudged.is_empty() && driver.judging.is_none());
}

#[tokio::test]
async fn the_answer_does_not_wait_for_the_gate_and_a_newer_model_replaces_one_that_is_being_judged() {
    let root = tempfile::tempdir().unwrap();
    let lanes = vec![lane("web", 0..CHANNELS)];
    let mut driver = driver(root.path(), lanes.clone()).await;
    let good = GlobalModel::initial(CHANNELS, 1);
    for (version, model) in [(1, &poisoned()), (2, &good)] {
        arrive(&mut driver, version, model);
        let version = ModelVersion(version);
        // This test's runtime has one thread and nothing was awaited: no verdict can be known.
        assert_eq!(driver.hold(version), Some(Input::Held { version }));
        assert_eq!(
            driver.judging.as_ref().unwrap().model.held.version,
            ModelVersion(1)
        );
    }
    judged(&mut driver).await;
    assert!(
        lanes[0].global().is_none(),
        "what was found about the first is nobody's concern"
    );
    assert_eq!(
        driver.judging.as_ref().unwrap().model.held.version,
        ModelVersion(2)
    );
    judged(&mut driver).await;
    assert_eq!(lanes[0].detector().unwrap().provenance().model_version, 2);
    driver.keeping.take().unwrap().await.unwrap();
    let (held, _, model) = global_store::load(&driver.client.dir.model(), CHANNELS).unwrap();
    assert_eq!(
        (held.version, model),
        (ModelVersion(2), good),
        "the newer one is kept"
    );
}

#[tokio::test]
async fn a_lane_without_rows_judges_when_it_has_them_and_one_that_used_the_model_leans_on_it_again() {
    let root = tempfile::tempdir().unwrap();
    let empty = LaneShared::new(
        "db",
        FeatureSchema::host_service_v1(),
        10_000,
        &DetectionSettings::default(),
        STEP,
    );
    let lanes = vec![lane("web", 0..CHANNELS), Arc::new(empty)];
    let mut first = driver(root.path(), lanes.clone()).await;
    arrive(&mut first, 1, &GlobalModel::initial(CHANNELS, 1));
    first.hold(ModelVersion(1)).unwrap();
    judged(&mut first).await;
    assert_eq!(first.unjudged, BTreeSet::from([1]));
    assert!(!first.judge_held(), "there is still nothing to judge it with");
    first.keeping.take().unwrap().await.unwrap();
    drop(first);

    let again = vec![lane("web", 0..CHANNELS), lane("db", 0..CHANNELS)];
    again[0].replace(lanes[0].detector().unwrap());
    let mut second = driver(root.path(), again.clone()).await;
    assert!(again[0].global().is_some() && again[1].global().is_none());
    assert!(second.judge_held());
    judged(&mut second).await;
    assert!(again[1].global().is_some() && second.unjudged.is_empty());
}

#[tokio::test]
async fn a_second_model_of_the_same_version_is_another_model() {
    let root = tempfile::tempdir().unwrap();
    let lanes = vec![lane("web", 0..1)];
    let mut driver = driver(root.path(), lanes.clone()).await;
    let version = ModelVersion(1);
    for model in [&GlobalModel::initial(CHANNELS, 1), &poisoned()] {
        arrive(&mut driver, 1, model);
        driver.hold(version).unwrap();
    }
    judged(&mut driver).await;
    assert!(
        lanes[0].global().is_none(),
        "what was found about the good one is no word about its successor"
    );
    judged(&mut driver).await;
    assert_eq!(driver.client.board.status().gate, "worse_on_tail");
    assert!(lanes[0].global().is_none() && driver.unjudged.is_empty());

    // Nor does a detector that leans on the first, kept by an earlier run, speak for the second.
    let mut leaning = (*lanes[0].detector().unwrap()).clone();
    leaning.set_provenance(theriac_model::detector::Provenance {
        model_version: 1,
        model_digest: "another".to_owned(),
        ..theriac_model::detector::Provenance::default()
    });
    lanes[0].replace(Arc::new(leaning));
    let held = driver.held.clone().unwrap();
    assert_eq!(driver.client.unjudged(&held), BTreeSet::from([0]));
    assert!(lanes[0].global().is_none());
}

#[tokio::test]
async fn the_page_shows_every_lanes_last_verdict() {
    let root = tempfile::tempdir().unwrap();
    let settings = DetectionSettings::default();
    let empty = LaneShared::new("db", FeatureSchema::host_service_v1(), 10_000, &settings, STEP);
    let lanes = vec![lane("web", 0..1), Arc::new(empty)];
    let mut driver = driver(root.path(), lanes.clone()).await;
    arrive(&mut driver, 1, &poisoned());
    driver.hold(ModelVersion(1)).unwrap();
    judged(&mut driver).await;
    let later = lane("db", 1..CHANNELS);
    for row in later.history().quiet(400).iter_rows() {
        let (at_ms, values) = (1, row.to_vec());
        lanes[1].history().push(Sample { at_ms, values }, true);
    }
    lanes[1].replace(later.detector().unwrap());
    assert!(driver.judge_held());
    judged(&mut driver).await;
    assert_eq!(
        driver.client.board.status().gate,
        "web: worse_on_tail, db: accepted"
    );
}

fn candidate(base: &GlobalModel, version: u64, model: &GlobalModel) -> (CandidateV1, Bytes) {
    let bytes = |model: &GlobalModel| -> Bytes {
        let values = model.values().iter();
        values.flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
    };
    let payload = bytes(model);
    let header = CandidateV1 {
        round: Round(version + 1),
        base_version: ModelVersion(version),
        base_digest: Digest::of(&bytes(base)),
        layout_digest: Digest(model_layout(CHANNELS).digest()),
        values: u32::try_from(model.values().len()).unwrap(),
        payload_digest: Digest::of(&payload),
        deadline_ms: 30_000,
    };
    (header, payload)
}

/// What the aggregator is told about the candidate at hand.
async fn appraised(driver: &mut Driver) -> Option<AppraisalV1> {
    driver.judging = None;
    let answer = next_answer(&mut driver.training, &mut driver.judging, &mut driver.appraising).await;
    assert!(matches!(answer, Answer::Appraised { .. }));
    assert_eq!(driver.answered(answer), None);
    match driver.to_say.take() {
        Some(ToAggregator::Appraisal(appraisal)) => Some(appraisal),
        _ => None,
    }
}

#[tokio::test]
async fn a_validator_tells_of_a_candidate_and_any_other_edge_is_silent() {
    let root = tempfile::tempdir().unwrap();
    let mut driver = driver(root.path(), vec![lane("web", 0..CHANNELS)]).await;
    let asks = |driver: &Driver| {
        let features = driver.hello().features;
        features.iter().any(|feature| feature == FEATURE_VALIDATOR)
    };
    let good = GlobalModel::initial(CHANNELS, 1);
    let (header, payload) = candidate(&good, 1, &poisoned());
    arrive(&mut driver, 1, &good);
    driver.hold(ModelVersion(1));
    assert!(!asks(&driver));
    driver.asked(header.clone(), &payload);
    assert!(driver.appraising.is_none() && driver.asked.is_none() && driver.to_say.is_none());
    driver.client.settings.validator = true;
    assert!(asks(&driver));
    driver.asked(header.clone(), &payload);
    let worse = appraised(&mut driver).await.unwrap();
    assert_eq!(
        (worse.appraisal, worse.payload_digest),
        (Appraisal::Worse, header.payload_digest)
    );
    assert!(worse.ratio_permille > 1_050, "{worse:?}");
    let (same, payload) = candidate(&good, 1, &good);
    driver.asked(same, &payload);
    let fine = appraised(&mut driver).await.unwrap();
    assert_eq!(
        (fine.appraisal, fine.ratio_permille),
        (Appraisal::NotWorse, 1_000)
    );
}

#[tokio::test]
async fn a_candidate_waits_for_the_model_it_is_held_against_and_an_unreadable_one_is_answered_at_once() {
    let root = tempfile::tempdir().unwrap();
    let mut driver = driver(root.path(), vec![lane("web", 0..CHANNELS)]).await;
    driver.client.settings.validator = true;
    let (old, new) = (GlobalModel::initial(CHANNELS, 1), poisoned());
    arrive(&mut driver, 1, &old);
    driver.hold(ModelVersion(1));
    let (header, payload) = candidate(&new, 2, &old);
    driver.asked(header, &payload);
    assert!(driver.appraising.is_none(), "the base is not there yet");
    arrive(&mut driver, 2, &new);
    driver.hold(ModelVersion(2));
    let better = appraised(&mut driver).await.unwrap();
    assert_eq!(better.appraisal, Appraisal::NotWorse);
    assert!(better.ratio_permille < 1_000, "{better:?}");
    let (header, _) = candidate(&old, 1, &new);
    driver.asked(header, &Bytes::from_static(&[0; 7]));
    let Some(ToAggregator::Appraisal(told)) = driver.to_say.take() else {
        panic!("no answer")
    };
    assert_eq!((told.appraisal, told.ratio_permille), (Appraisal::CannotTell, 0));
}
