//! The command line against files: results, refusals, exit codes.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, one that is left out says so"
)]

mod command;

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime};

use clap::Parser as _;
use command::{Place, command, ended, json, problem};
use theriac_certs::{Authority, JoinToken, Role, Validity};
use theriac_command::problem::Exit;
use theriac_edge::commands::{Arguments, execute};
use theriac_edge::state_dir::{Joined, StateDir};
use theriac_model::arm::Arm;
use theriac_model::detector::{Detector, FitOptions, Provenance};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::{GlobalModel, delta_layout};
use theriac_model::io::{read_npy, read_recording};
use theriac_protocol::units::NodeId;

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

impl Place {
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
async fn a_column_that_vanished_is_missing_and_named() {
    let place = Place::new();
    let model = place.trained().await;
    let text: String = std::iter::once("time,load,disk\n".to_owned())
        .chain((0..100).map(|row| format!("{},0.3,0.1\n", 1_700_000_000 + 60 * row)))
        .collect();
    std::fs::write(place.path("two.csv"), text).unwrap();
    let (input, output) = (place.text("two.csv"), place.text("s.npy"));
    let report = json(&["score", "--model", &model, "--input", &input, "--output", &output]).await;
    assert_eq!(report["absent"], serde_json::json!(["memory"]));
    assert_eq!(report["missing"], 100);
    assert!(
        read_npy(Path::new(&output))
            .unwrap()
            .values
            .iter()
            .all(|score| score.is_finite())
    );
}

#[tokio::test]
async fn explained_alarms_name_the_planted_channel_with_its_evidence_and_are_drawn() {
    let place = Place::new();
    let model = place.trained().await;
    metrics(&place.path("today.csv"), 400, |row, cells| {
        if (220..260).contains(&row) {
            "3.5".clone_into(&mut cells[2]);
        }
    });
    let (input, scores, picture) = (place.text("today.csv"), place.text("s.npy"), place.text("s.svg"));
    let words = [
        "score",
        "--model",
        &model,
        "--input",
        &input,
        "--output",
        &scores,
        "--explain",
        "--plot",
        &picture,
    ];
    let report = json(&words).await;
    let alarms = report["alarms"].as_array().unwrap();
    assert_eq!(alarms.len(), 1, "{alarms:?}");
    let cause = &alarms[0]["causes"][0];
    assert_eq!(cause["channel"], "memory");
    assert_eq!(
        (alarms[0]["row"].as_u64(), cause["since_row"].as_u64()),
        (Some(220), Some(220))
    );
    assert_eq!(alarms[0]["from"], "2023-11-15T01:53:20Z");
    assert!(cause["change"].as_f64().unwrap() > 4.0 && cause["residual_share"].as_f64().unwrap() > 0.5);
    let svg = std::fs::read_to_string(place.path("s.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("today.csv") && svg.contains("memory"));
    // Nowhere to write to.
    let nowhere = place.text("no/such/folder/s.svg");
    let words = [
        "score", "--model", &model, "--input", &input, "--output", &scores, "--plot", &nowhere,
    ];
    assert_eq!(problem(&words).await.code, "TH-E0325");
}

#[tokio::test]
async fn rows_without_a_score_are_counted_and_columns_that_no_model_knows_are_named() {
    let place = Place::new();
    let model = place.trained().await;
    let mut text = String::from("time,load,memory,disk,swap\n");
    for row in 0..200 {
        let cells = if (100..150).contains(&row) {
            ",,,"
        } else {
            "0.3,0.5,0.1,7"
        };
        _ = writeln!(text, "{},{cells}", 1_700_000_000 + 60 * row);
    }
    std::fs::write(place.path("flood.csv"), text).unwrap();
    let (input, output) = (place.text("flood.csv"), place.text("s.npy"));
    let report = json(&["score", "--model", &model, "--input", &input, "--output", &output]).await;
    // Held for ten rows, then blind, until all lags are there again.
    assert_eq!(report["unscored"], 50, "{report}");
    assert_eq!(report["ignored"], serde_json::json!(["swap"]));
    assert!(report["alarm_count"].is_u64(), "{report}");
}

#[tokio::test]
async fn a_file_of_another_pace_is_not_scored() {
    let place = Place::new();
    let model = place.trained().await;
    for (every, fits) in [(1, false), (50, true), (80, true), (300, false), (900, false)] {
        metrics(&place.path("f.csv"), 100, |row, cells| {
            cells[0] = (1_700_000_000 + every * row).to_string();
        });
        let (input, output) = (place.text("f.csv"), place.text("s.npy"));
        let words = ["score", "--model", &model, "--input", &input, "--output", &output];
        let (result, _) = command(&words).await;
        assert_eq!(result.is_ok(), fits, "rows every {every} s");
        if let Err(refused) = result {
            assert_eq!(refused.code, "TH-E0323");
            assert!(refused.message.contains("one every 1m"), "{refused}");
        }
    }
}

#[tokio::test]
async fn nothing_that_is_read_is_written_over() {
    let place = Place::new();
    let model = place.trained().await;
    let input = place.text("train.csv");
    let before = std::fs::read(place.path("train.csv")).unwrap();
    std::os::unix::fs::symlink(place.path("train.csv"), place.path("link.npy")).unwrap();
    std::os::unix::fs::symlink(place.path("host.safetensors"), place.path("model.svg")).unwrap();
    std::fs::hard_link(place.path("train.csv"), place.path("hard.npy")).unwrap();
    let (link, picture, s) = (
        place.text("link.npy"),
        place.text("model.svg"),
        place.text("s.npy"),
    );
    for rest in [
        &["--output", &link][..],
        &["--output", &place.text("hard.npy")],
        &["--output", &input],
        &["--output", &place.text("s.csv")],
        &["--output", &s, "--plot", &picture],
        &["--output", &s, "--plot", &place.text("s.png")],
    ] {
        let words = [&["score", "--model", &model, "--input", &input][..], rest].concat();
        let refused = problem(&words).await;
        assert_eq!(
            (refused.code, refused.exit),
            ("TH-E0334", Exit::Usage),
            "{rest:?}"
        );
    }
    std::os::unix::fs::symlink(place.path("train.csv"), place.path("trap.safetensors")).unwrap();
    let refused = problem(&[
        "train",
        "--input",
        &input,
        "--model",
        &place.text("trap.safetensors"),
    ])
    .await;
    assert_eq!(refused.code, "TH-E0334");
    assert_eq!(std::fs::read(place.path("train.csv")).unwrap(), before);
}

#[tokio::test]
async fn train_takes_only_numbers_that_make_sense_and_says_what_it_took() {
    let place = Place::new();
    place.trained().await;
    let (input, model) = (place.text("train.csv"), place.text("m.safetensors"));
    let line = ["theriac-edge", "train", "--input", &input, "--model", &model];
    for bad in [
        &["--false-alarms-per-day", "nan"][..],
        &["--false-alarms-per-day", "inf"],
        &["--false-alarms-per-day", "0"],
        &["--false-alarms-per-day=-1"],
        &["--step", "0s"],
        &["--step", "100d"],
        &["--half-lives", "0s", "1m"],
        &["--arm", "level"],
    ] {
        assert!(
            Arguments::try_parse_from([&line[..], bad].concat()).is_err(),
            "{bad:?}"
        );
    }
    let refused = problem(&[&line[1..], &["--half-lives", "5m", "3m"]].concat()).await;
    assert_eq!(refused.code, "TH-E0334");
    let report = json(&[&line[1..], &["--arm", "own"]].concat()).await;
    assert_eq!(report["step_seconds"], 60.0);
    assert_eq!(
        report["muted"],
        serde_json::json!(["disk"]),
        "it moves by less than .02"
    );
    let detector = Detector::load(place.0.path(), "m").unwrap();
    assert_eq!(detector.options().arm, Arm::Own);
    // No header, and times in milliseconds.
    for (text, word) in [
        ("1,0.1,0.2\n2,0.1,0.2\n", "header"),
        (
            "2024-01-31T12:00:00Z,0.1,0.2\n2024-01-31T12:01:00Z,0.1,0.2\n",
            "header",
        ),
        ("time,a\n1700000000000,0.1\n1700000060000,0.2\n", "milliseconds"),
    ] {
        std::fs::write(place.path("bad.csv"), text).unwrap();
        let refused = problem(&["train", "--input", &place.text("bad.csv"), "--model", &model]).await;
        assert_eq!(refused.code, "TH-E0320");
        assert!(refused.message.contains(word), "{refused}");
    }
    // Sixteen columns without names are what the caller says.
    let own = FeatureSchema::host_service_v1();
    let rows: Vec<f32> = (0..200 * 16).map(|i| (i as f32 * 0.37).sin()).collect();
    theriac_model::io::write_npy_f32(&place.path("a.npy"), &[200, 16], &rows).unwrap();
    let array = place.text("a.npy");
    for (profile, name) in [(None, "recorded"), (Some("host-service-v1"), own.name.as_str())] {
        let mut words = vec!["train", "--input", &array, "--model", &model];
        words.extend(profile.iter().flat_map(|profile| ["--profile", *profile]));
        json(&words).await;
        assert_eq!(Detector::load(place.0.path(), "m").unwrap().schema().name, name);
    }
}

#[tokio::test]
async fn files_that_do_not_fit_are_refused_with_what_to_do() {
    let place = Place::new();
    let model = place.trained().await;
    let output = place.text("s.npy");
    std::fs::write(place.path("two.csv"), "time,load,disk\n1,0.1,0.2\n2,0.1,0.2\n").unwrap();
    std::fs::write(place.path("one.csv"), "time,load,other\n1,0.1,0.2\n2,0.1,0.2\n").unwrap();
    let refused = problem(&[
        "score",
        "--model",
        &model,
        "--input",
        &place.text("one.csv"),
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
    let checks = ended(&["doctor", "--state-dir", &state], ExitCode::FAILURE).await;
    let find = |name: &str| {
        checks
            .as_array()
            .unwrap()
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

const POLICY: &str = "version = 1\nsite = \"site-a\"\nepsilon = 4.0\n";

/// A state directory with a policy that its own key has signed.
async fn signed_place() -> (Place, String) {
    let place = Place::new();
    drop(theriac_edge::state_dir::StateDir::open(&place.path("state")).unwrap());
    std::fs::write(place.path("state/privacy.toml"), POLICY).unwrap();
    let state = place.text("state");
    json(&["privacy", "sign", "--state-dir", &state]).await;
    (place, state)
}

#[tokio::test]
async fn a_policy_is_signed_with_the_officers_key_and_every_edit_ends_the_signature() {
    let place = Place::new();
    let (key, policy, state) = (
        place.text("officer.key"),
        place.text("privacy.toml"),
        place.text("state"),
    );
    let made = json(&["privacy", "keygen", "--out", &key]).await;
    let public = made["policy_key"].as_str().unwrap();
    assert!(public.starts_with("thpk1_"), "{public}");
    let again = problem(&["privacy", "keygen", "--out", &key]).await;
    assert_eq!(again.code, "TH-E0340", "a key was overwritten");

    std::fs::write(&policy, POLICY).unwrap();
    let check = [
        "privacy",
        "check",
        &policy,
        "--policy-key",
        public,
        "--state-dir",
        &state,
    ];
    let unsigned = problem(&check).await;
    assert_eq!((unsigned.code, unsigned.exit), ("TH-E0307", Exit::Config));
    assert!(unsigned.message.contains("not signed"), "{unsigned}");
    let signed = json(&["privacy", "sign", &policy, "--key", &key, "--state-dir", &state]).await;
    assert_eq!(signed["signer"], public);
    assert_eq!(json(&check).await["version"], 1);

    std::fs::write(&policy, POLICY.replace("4.0", "8.0")).unwrap();
    let altered = problem(&check).await;
    assert_eq!((altered.code, altered.exit), ("TH-E0307", Exit::Config));
    assert!(altered.message.contains("altered"), "{altered}");
    std::fs::write(&policy, "site = \"site-a\"\nepsilon = 0\n").unwrap();
    let bad = problem(&["privacy", "sign", &policy, "--key", &key, "--state-dir", &state]).await;
    assert_eq!(bad.code, "TH-E0307", "what is no policy was signed");
}

#[tokio::test]
async fn the_loader_of_run_takes_only_a_policy_with_the_pinned_signature() {
    let (place, state) = signed_place().await;
    json(&["check-config", "--state-dir", &state]).await;
    let key = place.text("officer.key");
    let public = json(&["privacy", "keygen", "--out", &key]).await["policy_key"].clone();
    let config = place.text("edge.toml");
    let text = format!("state_dir = '{state}'\n[federation]\npolicy_key = {public}\n");
    std::fs::write(&config, text).unwrap();
    // Its own key does not count any more.
    let refused = problem(&["check-config", "--config", &config]).await;
    assert_eq!((refused.code, refused.exit), ("TH-E0307", Exit::Config));
    let file = place.text("state/privacy.toml");
    json(&["privacy", "sign", &file, "--key", &key, "--config", &config]).await;
    json(&["check-config", "--config", &config]).await;
}

#[tokio::test]
async fn a_block_that_holds_no_whole_samples_is_a_configuration_error() {
    let (place, state) = signed_place().await;
    let config = place.text("edge.toml");
    for (interval, block, fits) in [("7s", "1h", false), ("1m", "10m", false), ("1m", "11m", true)] {
        std::fs::write(
            &config,
            format!("state_dir = '{state}'\n[sampling]\ninterval = '{interval}'\n"),
        )
        .unwrap();
        let policy = format!("{POLICY}block = \"{block}\"\n");
        std::fs::write(place.path("state/privacy.toml"), policy).unwrap();
        json(&["privacy", "sign", "--state-dir", &state]).await;
        let (result, _) = command(&["check-config", "--config", &config]).await;
        match result {
            Ok(_) => assert!(fits, "{interval} in {block}"),
            Err(problem) => {
                assert!(
                    !fits && problem.code == "TH-E0307",
                    "{interval} in {block}: {problem}"
                );
                assert!(problem.message.contains("sampling.interval"), "{problem}");
            }
        }
    }
}

#[tokio::test]
async fn a_report_is_written_and_verified_and_a_changed_one_is_not_true() {
    let (place, state) = signed_place().await;
    let none = problem(&["privacy", "report", "--state-dir", &state]).await;
    assert_eq!(none.code, "TH-E0341");
    let config = theriac_edge::config::EdgeConfig::load(None, []).unwrap();
    let dir = theriac_edge::state_dir::StateDir::existing(&place.path("state"));
    let node = "site-a".parse().unwrap();
    let at = theriac_protocol::units::Timestamp(1);
    drop(theriac_edge::client::opening::ledger(&config, &dir, &node, None, at).unwrap());

    let (report, page) = (place.text("report.json"), place.text("report.html"));
    json(&[
        "privacy",
        "report",
        "--state-dir",
        &state,
        "--output",
        &report,
        "--html",
        &page,
    ])
    .await;
    assert!(std::fs::read_to_string(&page).unwrap().contains("site-a"));
    let verified = json(&["privacy", "verify", &report]).await;
    assert_eq!(
        (verified["releases"].as_u64(), verified["records"].as_u64()),
        (Some(0), Some(2))
    );
    let text = std::fs::read_to_string(&report).unwrap();
    std::fs::write(
        &report,
        text.replace("\"epsilon_limit\": 4.0", "\"epsilon_limit\": 40.0"),
    )
    .unwrap();
    let untrue = problem(&["privacy", "verify", &report]).await;
    assert_eq!((untrue.code, untrue.exit), ("TH-E0342", Exit::Failed));
    assert!(
        untrue.message.contains("was changed after it was written"),
        "{untrue}"
    );
}

#[tokio::test]
async fn privacy_account_prints_both_figures_and_refuses_what_is_no_mechanism() {
    // Row of dp-accounting 0.6.0: σ 1.1, q 64/15000, 14 063 steps, δ 1e-5: RDP 2.5967, distribution at most 2.3817, at least 2.3113.
    let terms = [
        "--sigma",
        "1.1",
        "--rate",
        "0.004266666666666667",
        "--steps",
        "14063",
        "--delta",
        "1e-5",
    ];
    let account = json(&[&["privacy", "account"], &terms[..]].concat()).await;
    let (rdp, pld) = (
        account["epsilon_rdp"].as_f64().unwrap(),
        account["epsilon_pld"].as_f64().unwrap(),
    );
    assert!(
        (2.59..2.69).contains(&rdp) && (2.311..2.405).contains(&pld),
        "{account}"
    );
    assert_eq!(account["order"], 8);
    for bad in [
        &["--sigma", "0"][..],
        &["--sigma", "-1"],
        &["--sigma", "nan"],
        &["--sigma", "1", "--rate", "1.5"],
        &["--sigma", "1", "--rate", "0"],
        &["--sigma", "1", "--delta", "1"],
        &["--sigma", "1", "--delta", "nan"],
        &["--sigma", "1", "--steps", "0"],
    ] {
        let problem = problem(&[&["privacy", "account"], bad].concat()).await;
        assert_eq!(
            (problem.code, problem.exit),
            ("TH-E0350", Exit::Usage),
            "{bad:?}: {problem}"
        );
    }
    // So little noise that no float holds the loss: infinite, and no NaN.
    let nothing = json(&["privacy", "account", "--sigma", "1e-200"]).await;
    assert!(
        nothing["epsilon_rdp"].is_null() && nothing["epsilon_pld"].is_null(),
        "{nothing}"
    );
}

#[tokio::test]
async fn privacy_plan_recommends_what_trains_and_nothing_when_hopeless() {
    let plan = [
        "privacy",
        "plan",
        "--epsilon",
        "4",
        "--delta",
        "1e-6",
        "--days",
        "90",
    ];
    let answer = ended(&plan, ExitCode::SUCCESS).await;
    assert_eq!(
        (&answer["blocks"], &answer["recommended"]),
        (&2160.into(), &"moments".into())
    );
    for plan in answer["plans"].as_array().unwrap() {
        assert!(plan["epsilon_rdp"].as_f64().unwrap() <= 4.0, "{plan}");
    }
    // One block of a day: the noise of every way of training is longer than five times what it says.
    let hopeless = [
        "privacy",
        "plan",
        "--epsilon",
        "0.5",
        "--days",
        "1",
        "--block",
        "1day",
        "--batch",
        "1",
    ];
    let answer = ended(&hopeless, ExitCode::FAILURE).await;
    assert!(answer["recommended"].is_null(), "{answer}");
    for bad in [
        &["--epsilon", "0"][..],
        &["--epsilon", "nan"],
        &["--epsilon", "4", "--delta", "1"],
        &["--epsilon", "4", "--days", "0"],
        &["--epsilon", "4", "--block", "100days"],
        &["--epsilon", "4", "--noise-multiplier-min", "nan"],
    ] {
        let problem = problem(&[&["privacy", "plan"], bad].concat()).await;
        assert_eq!(problem.code, "TH-E0350", "{bad:?}: {problem}");
    }
    let spent = problem(&[
        "privacy",
        "plan",
        "--epsilon",
        "1e-9",
        "--delta",
        "1e-300",
        "--batch",
        "99999",
    ])
    .await;
    assert_eq!(spent.code, "TH-E0351", "{spent}");
}

#[tokio::test]
async fn check_config_refuses_another_name_than_the_enrolled_one_as_run_does() {
    let place = Place::new();
    let state = place.text("state");
    let dir = theriac_edge::state_dir::StateDir::open(Path::new(&state)).unwrap();
    dir.save_joined(&theriac_edge::state_dir::Joined {
        node: theriac_protocol::units::NodeId::new("press-1").unwrap(),
        federation: "plant".to_owned(),
        aggregator: "127.0.0.1:7700".to_owned(),
    })
    .unwrap();
    std::fs::write(place.path("edge.toml"), "node = \"other\"\n").unwrap();
    let words = |command| {
        let config = place.text("edge.toml");
        [
            command,
            "--config".to_owned(),
            config,
            "--state-dir".to_owned(),
            state.clone(),
        ]
    };
    for name in ["check-config", "run"] {
        let words = words(name.to_owned());
        let refused = problem(&words.each_ref().map(String::as_str)).await;
        assert_eq!(
            (refused.code, refused.exit),
            ("TH-E0308", Exit::Config),
            "{name}: {refused}"
        );
    }
    std::fs::write(place.path("edge.toml"), "node = \"press-1\"\n").unwrap();
    let words = words("check-config".to_owned());
    let checked = json(&words.each_ref().map(String::as_str)).await;
    assert_eq!(
        (checked["node"].as_str(), checked["joined"].as_bool()),
        (Some("press-1"), Some(true))
    );
}

/// An interpreter with numpy: `THERIAC_PYTHON`, else `python3`.
fn python() -> Option<String> {
    let python = std::env::var("THERIAC_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python).args(["-c", "import numpy"]).output();
    if found.is_ok_and(|found| found.status.success()) {
        return Some(python);
    }
    println!("left out: docs/read_model.py, because {python} has no numpy (THERIAC_PYTHON names another)");
    None
}

/// The page's script reads the file with nothing of ours; both optional parts of a model, gaps and missing values included.
#[tokio::test]
async fn the_reader_in_the_documents_scores_as_score_does() {
    let Some(python) = python() else { return };
    let place = Place::new();
    let model = place.trained().await;
    let local = Detector::load(place.0.path(), "host").unwrap();
    let recording = read_recording(&place.path("train.csv")).unwrap();
    let rows = recording.select(local.schema()).unwrap().series;
    let delta: Vec<f32> = (0..delta_layout(3).len())
        .map(|index| (index as f32).sin() * 0.1)
        .collect();
    let global = GlobalModel::initial(3, 1).with_delta(&delta).unwrap();
    let federated = local.refit_with_global(&rows, &global, local.options()).unwrap();
    federated.save(place.0.path(), "federated").unwrap();
    // Five-minute rows, where the half-lives reach their least number of rows; and own lags alone.
    let slow = |arm: Arm| FitOptions {
        arm,
        ..FitOptions::new(Duration::from_mins(5))
    };
    for (name, arm) in [("slow", Arm::OwnFull), ("own", Arm::Own)] {
        let detector = Detector::fit(local.schema(), &rows, &slow(arm)).unwrap();
        detector.save(place.0.path(), name).unwrap();
    }
    metrics(&place.path("today.csv"), 200, |row, cells| {
        if (60..90).contains(&row) || row == 7 {
            cells[2].clear();
        }
        // What comes back after a long gap does not count until all its lags are there again.
        if (90..96).contains(&row) {
            "2.5".clone_into(&mut cells[2]);
        }
        if (120..130).contains(&row) {
            "3.5".clone_into(&mut cells[1]);
        }
    });
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/read_model.py");
    let (input, ours, theirs) = (
        place.text("today.csv"),
        place.text("ours.npy"),
        place.text("theirs.npy"),
    );
    let five_minutes = place.text("slow.csv");
    metrics(&place.path("slow.csv"), 200, |row, cells| {
        let hole = if row >= 100 { 20 } else { 0 };
        cells[0] = (1_700_000_000 + 300 * (row + hole)).to_string();
        if row >= 150 {
            "2.5".clone_into(&mut cells[2]);
        }
    });
    let read = |model: &str, input: &str| {
        Command::new(&python)
            .args([script, model, input, &theirs])
            .output()
            .unwrap()
    };
    for (model, input) in [
        (&model, &input),
        (&place.text("federated.safetensors"), &input),
        (&place.text("slow.safetensors"), &five_minutes),
        (&place.text("own.safetensors"), &five_minutes),
    ] {
        json(&["score", "--model", model, "--input", input, "--output", &ours]).await;
        let ran = read(model, input);
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        let (ours, theirs) = (
            read_npy(Path::new(&ours)).unwrap(),
            read_npy(Path::new(&theirs)).unwrap(),
        );
        assert_eq!(ours.shape, [200]);
        assert_eq!(theirs.shape, [200]);
        for (row, (ours, theirs)) in ours.values.iter().zip(&theirs.values).enumerate() {
            let near =
                (ours - theirs).abs() <= 1e-5 * ours.abs().max(1.0) || ours.is_nan() && theirs.is_nan();
            assert!(near, "{model}, row {row}: {ours} here, {theirs} there");
        }
    }
    let mut bytes = std::fs::read(&model).unwrap();
    let version = br#"format_version\": 1"#;
    let at = bytes
        .windows(version.len())
        .position(|window| window == version)
        .unwrap();
    bytes[at + version.len() - 1] = b'9';
    std::fs::write(&model, bytes).unwrap();
    let refused = read(&model, &input);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("format version 9"),
        "{said}"
    );
}
