//! The command line against files: results, refusals, exit codes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Parser as _;
use theriac_certs::{Authority, JoinToken, Role, Validity};
use theriac_command::problem::{Exit, Problem};
use theriac_edge::commands::{Arguments, execute};
use theriac_edge::state_dir::{Joined, StateDir};
use theriac_model::detector::Provenance;
use theriac_model::feature::FeatureSchema;
use theriac_model::global::GlobalModel;
use theriac_model::io::read_npy;
use theriac_protocol::units::NodeId;

async fn command(words: &[&str]) -> (Result<ExitCode, Problem>, String) {
    let words = ["theriac-edge", "--format", "json"].iter().chain(words);
    let arguments = Arguments::try_parse_from(words).unwrap();
    let mut out = Vec::new();
    let result = Box::pin(execute(arguments, &mut out)).await;
    (result, String::from_utf8(out).unwrap())
}

async fn json(words: &[&str]) -> serde_json::Value {
    let (result, out) = command(words).await;
    result.unwrap();
    serde_json::from_str(&out).unwrap()
}

async fn problem(words: &[&str]) -> Problem {
    command(words).await.0.unwrap_err()
}

fn metrics(path: &Path, rows: u32, edit: impl Fn(u32, &mut Vec<String>)) {
    let mut text = String::from("time,load,memory,disk\n");
    for row in 0..rows {
        let wave = (f64::from(row) * 0.7).sin() * 0.05;
        let mut cells: Vec<String> = vec![
            (1_700_000_000 + 60 * row).to_string(),
            format!("{:.4}", 0.3 + wave),
            format!("{:.4}", 0.5 - wave),
            format!("{:.4}", 0.1 + wave * wave),
        ];
        edit(row, &mut cells);
        text += &(cells.join(",") + "\n");
    }
    std::fs::write(path, text).unwrap();
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    async fn trained(&self) -> String {
        metrics(&self.path("train.csv"), 600, |_, _| {});
        let (input, model) = (self.text("train.csv"), self.text("host.safetensors"));
        json(&["train", "--input", &input, "--model", &model, "--seed", "7"]).await;
        model
    }
}

#[tokio::test]
async fn train_then_score_finds_what_was_planted_and_names_the_channel() {
    let place = Place::new();
    let model = place.trained().await;
    metrics(&place.path("today.csv"), 200, |row, cells| {
        if (120..160).contains(&row) {
            "3.5".clone_into(&mut cells[2]);
        }
    });
    let (input, scores) = (place.text("today.csv"), place.text("scores.npy"));
    let report = json(&[
        "score",
        "--model",
        &model,
        "--input",
        &input,
        "--output",
        &scores,
        "--explain",
    ])
    .await;
    assert_eq!(report["rows"], 200);
    let found = read_npy(Path::new(&scores)).unwrap();
    assert_eq!(found.shape, [200]);
    let worst = (0..200)
        .max_by(|a, b| found.values[*a].total_cmp(&found.values[*b]))
        .unwrap();
    assert!((120..185).contains(&worst), "the worst row is {worst}");
    let causes = read_npy(&place.path("scores.causes.npy")).unwrap();
    assert_eq!(causes.shape, [200, 3]);
    let row = &causes.values[121 * 3..][..3];
    assert!(
        row[1] > row[0] && row[1] > row[2],
        "memory is not the leading cause: {row:?}"
    );
}

#[tokio::test]
async fn the_same_input_and_seed_give_the_same_model() {
    let place = Place::new();
    place.trained().await;
    let first = std::fs::read(place.path("host.safetensors")).unwrap();
    place.trained().await;
    assert_eq!(std::fs::read(place.path("host.safetensors")).unwrap(), first);
}

#[tokio::test]
async fn gaps_and_missing_values_are_counted() {
    let place = Place::new();
    let model = place.trained().await;
    metrics(&place.path("holes.csv"), 100, |row, cells| {
        if row == 10 {
            cells[1].clear();
        }
        if row == 11 {
            "NaN".clone_into(&mut cells[3]);
        }
        if row >= 50 {
            cells[0] = (1_700_000_000 + 60 * (row + 5)).to_string();
        }
    });
    let (input, output) = (place.text("holes.csv"), place.text("s.npy"));
    let report = json(&["score", "--model", &model, "--input", &input, "--output", &output]).await;
    assert_eq!(
        (report["missing"].as_u64(), report["gaps"].as_u64()),
        (Some(2), Some(1)),
        "{report}"
    );
}

#[tokio::test]
async fn files_that_do_not_fit_are_refused_with_what_to_do() {
    let place = Place::new();
    let model = place.trained().await;
    let output = place.text("s.npy");
    std::fs::write(place.path("two.csv"), "time,load,disk\n1,0.1,0.2\n2,0.1,0.2\n").unwrap();
    let refused = problem(&[
        "score",
        "--model",
        &model,
        "--input",
        &place.text("two.csv"),
        "--output",
        &output,
    ])
    .await;
    assert!(
        refused.message.contains("memory"),
        "the missing column is not named: {refused}"
    );
    assert!(refused.hint.is_some() && refused.exit == Exit::Failed);
    let refused = problem(&[
        "score",
        "--model",
        &model,
        "--input",
        &place.text("none.csv"),
        "--output",
        &output,
    ])
    .await;
    assert_eq!(refused.code, "TH-E0320");
    let refused = problem(&[
        "train",
        "--input",
        &place.text("two.csv"),
        "--model",
        &place.text("m.safetensors"),
    ])
    .await;
    assert_eq!(refused.code, "TH-E0322", "two rows are no history: {refused}");
    let refused = problem(&[
        "train",
        "--input",
        &place.text("train.csv"),
        "--model",
        &place.text("m.bin"),
    ])
    .await;
    assert_eq!((refused.code, refused.exit), ("TH-E0324", Exit::Usage));
}

#[tokio::test]
async fn truncated_and_missing_models_are_refused() {
    let place = Place::new();
    let model = place.trained().await;
    let input = place.text("train.csv");
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&model, &bytes[..bytes.len() / 2]).unwrap();
    let refused = problem(&[
        "score",
        "--model",
        &model,
        "--input",
        &input,
        "--output",
        &place.text("s.npy"),
    ])
    .await;
    assert_eq!(refused.code, "TH-E0321", "{refused}");
    assert!(!place.path("s.npy").exists());
    let gone = place.text("gone.safetensors");
    let refused = problem(&[
        "score",
        "--model",
        &gone,
        "--input",
        &input,
        "--output",
        &place.text("s.npy"),
    ])
    .await;
    assert!(refused.message.contains("gone"), "{refused}");
}

#[tokio::test]
async fn commands_that_only_look_make_nothing() {
    let place = Place::new();
    let state = place.text("state");
    assert_eq!(
        json(&["incidents", "list", "--state-dir", &state]).await,
        serde_json::json!([])
    );
    assert_eq!(
        json(&["privacy", "status", "--state-dir", &state]).await["releases"],
        0
    );
    let checked = json(&["check-config", "--state-dir", &state]).await;
    assert_eq!(
        (checked["valid"].as_bool(), checked["joined"].as_bool()),
        (Some(true), Some(false))
    );
    let (result, out) = command(&["doctor", "--state-dir", &state]).await;
    result.unwrap();
    let checks: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
    for name in [
        "clock",
        "/proc",
        "socket",
        "state",
        "disk",
        "keys",
        "store",
        "ledger",
        "aggregator",
    ] {
        assert!(
            checks.iter().any(|check| check["check"] == name),
            "{name} is not checked"
        );
    }
    assert!(!place.path("state").exists(), "looking made a state directory");
    assert_eq!(problem(&["status", "--state-dir", &state]).await.code, "TH-E0330");
    assert_eq!(
        problem(&["incidents", "why", "3", "--state-dir", &state])
            .await
            .code,
        "TH-E0331"
    );
}

#[tokio::test]
async fn doctor_finds_open_keys_and_damaged_stores() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let state = place.text("state");
    let dir = theriac_edge::state_dir::StateDir::open(Path::new(&state)).unwrap();
    drop(theriac_edge::store::Store::open(&dir).unwrap());
    std::fs::write(dir.keys().join("edge.pem"), "x").unwrap();
    std::fs::set_permissions(
        dir.keys().join("edge.pem"),
        std::fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    let (result, out) = command(&["doctor", "--state-dir", &state]).await;
    assert_eq!(
        format!("{:?}", result.unwrap()),
        format!("{:?}", ExitCode::FAILURE)
    );
    let checks: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
    let find = |name: &str| {
        checks
            .iter()
            .find(|check| check["check"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(find("keys")["result"], "fail");
    assert!(find("keys")["fix"].as_str().unwrap().contains("chmod 600"));
    assert_eq!(find("store")["result"], "ok");
}

/// A state directory with an edge's identity of this validity.
fn joined(place: &Place, validity: Validity) -> StateDir {
    let dir = StateDir::open(&place.path("state")).unwrap();
    let node: NodeId = "a".parse().unwrap();
    let authority = Authority::generate("f", Role::Edge, SystemTime::now()).unwrap();
    let identity = authority.issue(&node, &[], validity).unwrap();
    identity.save(&dir.keys(), "edge").unwrap();
    dir.save_joined(&Joined {
        node,
        federation: "f".into(),
        aggregator: "127.0.0.1:1".into(),
    })
    .unwrap();
    dir
}

/// Result, detail and fix of one line.
async fn diagnosis(words: &[&str], name: &str) -> (String, String, String) {
    let words: Vec<&str> = ["doctor"].iter().chain(words).copied().collect();
    let (result, out) = command(&words).await;
    result.unwrap();
    let checks: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
    let check = checks.iter().find(|check| check["check"] == name).unwrap();
    let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
    (text("result"), text("detail"), text("fix"))
}

#[tokio::test]
async fn doctor_says_why_an_identity_cannot_be_used() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let state = place.text("state");
    let now = SystemTime::now();
    let dir = joined(&place, Validity::starting(now, Duration::from_hours(100)));
    let pem = dir.keys().join("edge.pem");
    assert_eq!(diagnosis(&["--state-dir", &state], "keys").await.0, "ok");

    std::fs::set_permissions(&pem, std::fs::Permissions::from_mode(0o644)).unwrap();
    for name in ["keys", "aggregator"] {
        let (result, detail, fix) = diagnosis(&["--state-dir", &state], name).await;
        assert_eq!(result, "fail", "{name}");
        assert!(detail.contains("mode 0644"), "{name}: {detail}");
        assert!(fix.contains("chmod 600"), "{name}: {fix}");
    }
    std::fs::set_permissions(&pem, std::fs::Permissions::from_mode(0o600)).unwrap();
    let whole = std::fs::read(&pem).unwrap();
    std::fs::write(&pem, &whole[..whole.len() / 3]).unwrap();
    for name in ["keys", "aggregator"] {
        let (result, detail, fix) = diagnosis(&["--state-dir", &state], name).await;
        assert_eq!(result, "fail", "{name}");
        assert!(detail.contains("edge.pem is damaged"), "{name}: {detail}");
        assert!(fix.contains("--renew"), "{name}: {fix}");
    }
    std::fs::remove_file(&pem).unwrap();
    std::fs::write(dir.keys().join("edge.pending.pem"), "x").unwrap();
    std::fs::set_permissions(
        dir.keys().join("edge.pending.pem"),
        std::fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    let (result, detail, _) = diagnosis(&["--state-dir", &state], "keys").await;
    assert!(
        result == "warn" && detail.contains("no complete identity"),
        "{detail}"
    );
}

#[tokio::test]
async fn doctor_tells_a_clock_that_is_behind_its_own_certificate() {
    let place = Place::new();
    let begin = SystemTime::now() + Duration::from_hours(30 * 24);
    joined(&place, Validity::starting(begin, Duration::from_hours(100)));
    let state = place.text("state");
    for name in ["clock", "keys"] {
        let (result, detail, fix) = diagnosis(&["--state-dir", &state], name).await;
        assert_eq!(result, "fail", "{name}");
        assert!(
            detail.contains("valid from") && fix.contains("set"),
            "{name}: {detail} ({fix})"
        );
    }
}

#[tokio::test]
async fn doctor_tries_the_check_of_a_services_state() {
    let place = Place::new();
    let state = place.text("state");
    std::fs::create_dir(place.path("kv")).unwrap();
    let config = |script: &str| {
        let text = format!(
            "state_dir = '{state}'\n[[service]]\nname = 'kv'\nargv = ['true']\n[service.state]\ndir = '{}'\n\
             check = ['/bin/sh', '-c', '{script}', 'check', '{{state}}']\n",
            place.text("kv")
        );
        std::fs::write(place.path("edge.toml"), text).unwrap();
    };
    let path = place.text("edge.toml");
    config("test -d \"$1\"");
    assert_eq!(diagnosis(&["--config", &path], "checkpoints").await.0, "ok");
    config("echo usage >&2; exit 2");
    let (result, detail, fix) = diagnosis(&["--config", &path], "checkpoints").await;
    assert_eq!(result, "fail");
    assert!(
        detail.contains("kv: 0 valid") && detail.contains("exit status: 2") && detail.contains("usage"),
        "{detail}"
    );
    assert!(fix.contains("state.check"), "{fix}");
    assert!(!place.path("state").exists(), "looking made a state directory");
}

#[tokio::test]
async fn a_state_directory_that_others_can_read_is_wrong_configuration() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    std::fs::create_dir(place.path("state")).unwrap();
    std::fs::set_permissions(place.path("state"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let refused = problem(&["run", "--state-dir", &place.text("state")]).await;
    assert_eq!((refused.code, refused.exit), ("TH-E0303", Exit::Config));
}

#[tokio::test]
async fn a_problem_with_a_file_names_it_once_and_says_what_is_missing_or_mistaken() {
    let place = Place::new();
    let gone = place.text("none.csv");
    let model = place.text("m.safetensors");
    let refused = problem(&["train", "--input", &gone, "--model", &model]).await;
    assert_eq!(refused.message.matches("none.csv").count(), 1, "{refused}");
    metrics(&place.path("large.csv"), 600, |_, cells| {
        for cell in &mut cells[1..] {
            "1e300".clone_into(cell);
        }
    });
    let refused = problem(&["train", "--input", &place.text("large.csv"), "--model", &model]).await;
    assert!(refused.message.contains("±3.4e38"), "{refused}");

    let schema = FeatureSchema::recorded("recorded", 3);
    GlobalModel::initial(3, 1)
        .save(place.0.path(), "global", &schema, &Provenance::default())
        .unwrap();
    metrics(&place.path("today.csv"), 100, |_, _| {});
    let refused = problem(&[
        "score",
        "--model",
        &place.text("global.safetensors"),
        "--input",
        &place.text("today.csv"),
        "--output",
        &place.text("s.npy"),
    ])
    .await;
    assert_eq!(
        refused.message.matches("global.safetensors").count(),
        1,
        "{refused}"
    );
    assert!(
        refused.message.contains("global model of a federation") && refused.message.contains("no detector"),
        "{refused}"
    );
}

#[tokio::test]
async fn joining_again_names_the_run_that_uses_the_same_configuration() {
    let place = Place::new();
    joined(
        &place,
        Validity::starting(SystemTime::now(), Duration::from_hours(100)),
    );
    let text = format!("state_dir = '{}'\n", place.text("state"));
    std::fs::write(place.path("e1.toml"), text).unwrap();
    let token = JoinToken::generate([7; 32]).unwrap().to_string();
    let config = place.text("e1.toml");
    let words: [&str; 7] = [
        "join",
        "--aggregator",
        "127.0.0.1:1",
        "--token",
        &token,
        "--config",
        &config,
    ];
    let arguments = Arguments::try_parse_from(["theriac-edge"].iter().chain(&words)).unwrap();
    let mut out = Vec::new();
    Box::pin(execute(arguments, &mut out)).await.unwrap();
    let said = String::from_utf8(out).unwrap();
    assert!(
        said.contains(&format!("next  theriac-edge run --config {config}\n")),
        "{said}"
    );
}

#[tokio::test]
async fn wrong_configurations_and_tokens_have_their_own_exit_codes() {
    let place = Place::new();
    std::fs::write(place.path("edge.toml"), "[sampling]\nintervall = '1s'\n").unwrap();
    let refused = problem(&["check-config", "--config", &place.text("edge.toml")]).await;
    assert_eq!((refused.code, refused.exit), ("TH-E0301", Exit::Config));
    assert!(
        refused.to_string().contains("did you mean `interval`?"),
        "{refused}"
    );
    let state = place.text("state");
    let refused = problem(&[
        "join",
        "--aggregator",
        "127.0.0.1:1",
        "--token",
        "thrc1_x",
        "--state-dir",
        &state,
    ])
    .await;
    assert_eq!((refused.code, refused.exit), ("TH-E0312", Exit::Usage));
}
