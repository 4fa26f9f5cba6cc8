use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Parser;
use flate2::Compression;
use flate2::write::GzEncoder;
use theriac_model::detector::Detector;
use theriac_model::global::OwnLagWeights;
use theriac_model::gradient::LocalDescent;
use theriac_model::io::{NpyArray, read_npy, write_npy_f32};
use theriac_model::linear::FullWeights;

use super::*;

const CHANNELS: usize = 3;
const ROWS: usize = 1200;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// A directory of recorded sites `a`, `b`, …: noise around slow swings in 0..1; the test part has a jump at row 700.
struct Recorded {
    dir: tempfile::TempDir,
}

impl Recorded {
    fn sites(count: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for site in 0..count {
            let name = char::from(b'a' + site);
            let train = rows(u32::from(site) * 2 + 1);
            let mut test = rows(u32::from(site) * 2 + 2);
            (700..740).for_each(|t| test[t * CHANNELS] += 0.8);
            write(&dir.path().join(format!("{name}.train.npy.gz")), &train);
            write(&dir.path().join(format!("{name}.test.npy.gz")), &test);
        }
        Self { dir }
    }

    /// Runs with these arguments; the results lie in the folder `out`.
    fn simulate(&self, out: &str, line: &str) -> serde_json::Value {
        let (data, out) = (self.dir.path().to_str().unwrap(), self.out(out));
        let words = ["x", "--data", data, "--out", out.to_str().unwrap()].into_iter();
        let args = Cli::try_parse_from(words.chain(line.split_whitespace()))
            .unwrap()
            .args;
        run(args).unwrap().summary
    }

    fn out(&self, out: &str) -> PathBuf {
        self.dir.path().join(out)
    }

    fn array(&self, path: &str) -> NpyArray {
        read_npy(&self.dir.path().join(path)).unwrap()
    }

    fn rounds(&self, out: &str) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.out(out).join("rounds.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// Noise around a slow swing: what the mean of the last rows predicts well.
fn rows(seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut level = [0.5_f32; CHANNELS];
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    let mut values = Vec::new();
    for _ in 0..ROWS {
        for level in &mut level {
            *level = 0.5 + 0.99 * (*level - 0.5) + 0.04 * uniform();
            values.push(*level + 0.2 * uniform());
        }
    }
    values
}

fn write(path: &Path, values: &[f32]) {
    let plain = path.with_extension("");
    write_npy_f32(&plain, &[values.len() / CHANNELS, CHANNELS], values).unwrap();
    let mut packed = GzEncoder::new(fs::File::create(path).unwrap(), Compression::fast());
    packed.write_all(&fs::read(&plain).unwrap()).unwrap();
    packed.finish().unwrap();
    fs::remove_file(plain).unwrap();
}

#[test]
fn local_mode_writes_every_output_of_the_contract() {
    let recorded = Recorded::sites(2);
    let summary = recorded.simulate("out", "--mode local --threads 1");
    for site in ["a", "b"] {
        let scores = recorded.array(&format!("out/scores/{site}.npy"));
        assert_eq!(scores.shape, [ROWS]);
        let jump = scores.values[700..740].iter().copied().fold(0.0, f32::max);
        let before = scores.values[..690].iter().copied().fold(0.0, f32::max);
        assert!(jump > 2.0 * before, "{site}: {jump} against {before}");
        let alarms = recorded.array(&format!("out/alarms/{site}.npy"));
        assert!(alarms.values[700..710].iter().any(|alarm| *alarm > 0.0));
        let causes = recorded.array(&format!("out/causes/{site}.npy"));
        assert_eq!(causes.shape, [ROWS, CHANNELS]);
        let row = &causes.values[700 * CHANNELS..][..CHANNELS];
        assert!(row[0] > row[1] && row[0] > row[2], "{row:?}");
        assert!(Detector::load(&recorded.out("out").join("model"), site).is_ok());
    }
    assert_eq!(summary["sites"], serde_json::json!(["a", "b"]));
    for field in [
        "parameters",
        "rounds",
        "seconds",
        "bytes_up_per_site_round",
        "privacy",
        "refusals",
        "by_site",
    ] {
        assert!(summary.get(field).is_some(), "{field} is missing");
    }
    let file = fs::read(recorded.out("out").join("summary.json")).unwrap();
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&file).unwrap(),
        summary
    );
    assert_eq!(recorded.rounds("out").len(), 0);
}

#[test]
fn federated_rounds_are_charged_noised_published_and_judged() {
    let recorded = Recorded::sites(4);
    let summary = recorded.simulate("out", "--rounds 3 --epsilon 2");
    assert_eq!(
        (&summary["rounds"], &summary["rounds_aborted"]),
        (&3.into(), &0.into())
    );
    let epsilon = summary["privacy"]["epsilon"].as_f64().unwrap();
    assert!(
        (1.9..=2.0).contains(&epsilon),
        "three disjoint releases cost one: {epsilon}"
    );
    let rounds = recorded.rounds("out");
    assert_eq!(rounds.len(), 3);
    for round in &rounds {
        assert_eq!(round["outcome"], "published");
        assert_eq!(round["contributors"], serde_json::json!(["a", "b", "c", "d"]));
        assert_eq!(round["verdicts"].as_object().unwrap().len(), 4);
        assert!(
            round["bytes"]["a"]["up"].as_u64().unwrap() > 60
                && round["bytes"]["a"]["down"].as_u64() > Some(60)
        );
    }
    assert!(recorded.out("out").join("model/global.safetensors").exists());
    assert!(recorded.out("out").join("ledgers/all/a.log").exists());
}

#[test]
fn non_finite_updates_are_refused_by_name_and_harm_nobody() {
    let recorded = Recorded::sites(5);
    let summary = recorded.simulate("out", "--attack nan --malicious 2 --privacy off");
    assert_eq!(summary["refusals"], serde_json::json!({ "non_finite": 2 }));
    assert_eq!(summary["attack"]["malicious"], serde_json::json!(["a", "b"]));
    let caught = summary["attack"]["caught"].as_array().unwrap();
    assert!(
        ["a", "b"]
            .iter()
            .all(|site| caught.iter().any(|c| c["site"] == *site && c["round"] == 1))
    );
    assert_eq!(
        recorded.rounds("out")[0]["contributors"],
        serde_json::json!(["c", "d", "e"])
    );
    assert_eq!(summary["by_site"]["e"]["gate"], "accepted");
}

#[test]
fn sign_flips_are_caught_and_the_model_is_still_taken() {
    let recorded = Recorded::sites(5);
    for privacy in ["off", "block"] {
        let summary = recorded.simulate(
            privacy,
            &format!("--attack sign-flip --malicious 2 --privacy {privacy}"),
        );
        let caught = summary["attack"]["caught"].as_array().unwrap();
        for site in ["a", "b"] {
            assert!(
                caught.iter().any(|c| c["site"] == site),
                "{privacy}: {site} got away: {caught:?}"
            );
        }
        assert_eq!(summary["by_site"]["e"]["gate"], "accepted", "{privacy}");
    }
}

/// Every family through the real messages: what is false is refused by its own word, what looks true meets the rule, and the round
/// ends with a model of the honest.
#[test]
fn every_family_of_attacks_ends_with_its_refusal_and_a_model() {
    let recorded = Recorded::sites(5);
    for (attack, word) in [
        ("infinite", Some("non_finite")),
        ("huge", Some("norm_exceeded")),
        ("scaled-noise", Some("norm_exceeded")),
        ("wrong-length", Some("wrong_length")),
        ("replay", Some("wrong_nonce")),
        ("duplicate", Some("duplicate")),
        ("late", Some("round_closed")),
        ("poison-negate", Some("implausible")),
        ("ipm-1", Some("implausible")),
        ("alie-up-1", None),
        ("opt-ipm", None),
        ("mimic", None),
        ("mimic-jittered", None),
        ("subnormal", None),
    ] {
        let line = format!("--attack {attack} --malicious 2 --privacy off");
        let summary = recorded.simulate(attack, &line);
        let refusals = summary["refusals"].as_object().unwrap();
        if let Some(word) = word {
            // The last site's first update closes the round, so its second one comes too late.
            let wanted = if attack == "duplicate" { 1 } else { 2 };
            assert_eq!(
                refusals.get(word),
                Some(&serde_json::json!(wanted)),
                "{attack}: {refusals:?}"
            );
        }
        let round = &recorded.rounds(attack)[0];
        assert_eq!(round["outcome"], "published", "{attack}");
        let contributors = round["contributors"].as_array().unwrap();
        let honest = ["c", "d", "e"];
        assert!(
            honest
                .iter()
                .all(|site| contributors.contains(&serde_json::json!(site))),
            "{attack}"
        );
        // Of duplicates the first stays.
        if word.is_none() || attack == "duplicate" {
            let refused: u64 = refusals.values().filter_map(serde_json::Value::as_u64).sum();
            let in_model = contributors.len() as u64 - 3;
            assert!(in_model == 2 || in_model + refused == 2, "{attack}: {round}");
        } else {
            assert_eq!(contributors.len(), 3, "{attack}");
        }
    }
}

#[test]
fn with_noise_copies_and_riders_are_told_from_sites() {
    let recorded = Recorded::sites(5);
    let summary = recorded.simulate("zero", "--attack free-rider-zero --malicious 2");
    assert_eq!(summary["refusals"], serde_json::json!({ "implausible": 2 }));
    recorded.simulate("mimic", "--attack mimic --malicious 2 --rule mean");
    let round = &recorded.rounds("mimic")[0];
    let of = |name: &str| round[name].as_array().unwrap().len();
    // Both mimics and their victim are one group, of which the first by name stays; the others are in no sum and no number of sites.
    assert_eq!(
        (of("screened"), of("contributors"), of("evidence")),
        (2, 3, 3),
        "{round}"
    );
}

/// Without privacy noise everything is decided by arguments and data.
#[test]
fn same_arguments_give_the_same_bits_whatever_the_threads() {
    let recorded = Recorded::sites(3);
    recorded.simulate("one", "--privacy off --rounds 2 --threads 1");
    recorded.simulate("two", "--privacy off --rounds 2 --threads 2");
    for file in [
        "scores/a.npy",
        "alarms/b.npy",
        "model/global.safetensors",
        "rounds.jsonl",
    ] {
        let read = |out: &str| fs::read(recorded.out(out).join(file)).unwrap();
        assert!(read("one") == read("two"), "{file} differs");
    }
}

#[test]
fn federation_without_noise_comes_close_to_training_in_one_place() {
    let recorded = Recorded::sites(3);
    recorded.simulate("federated", "--privacy off");
    recorded.simulate("central", "--mode central");
    let weights = |out: &str| {
        let bytes = fs::read(recorded.out(out).join("model/a.safetensors")).unwrap();
        Detector::load(&recorded.out(out).join("model"), "a")
            .map(|d| (d, bytes.len()))
            .unwrap()
            .0
    };
    let prior = |out: &str| weights(out).options().prior.clone().unwrap();
    for (one, two) in prior("federated").values().iter().zip(prior("central").values()) {
        assert!((one - two).abs() < 0.02, "{one} against {two}");
    }
}

#[test]
fn every_site_in_turn_is_new_and_judges_the_model_of_the_others() {
    let recorded = Recorded::sites(3);
    for privacy in ["off", "block", "record"] {
        let summary = recorded.simulate(privacy, &format!("--cold-start 120 --privacy {privacy}"));
        assert_eq!(summary["federations"], 3);
        let rounds = recorded.rounds(privacy);
        assert_eq!(rounds.len(), 3);
        for (round, newcomer) in rounds.iter().zip(["a", "b", "c"]) {
            assert_eq!(round["newcomer"], newcomer);
            let contributors = round["contributors"].as_array().unwrap();
            assert!(
                contributors.len() == 2 && !contributors.contains(&newcomer.into()),
                "{contributors:?}"
            );
            assert!(!round["verdicts"][newcomer].is_null());
            assert_eq!(summary["by_site"][newcomer]["train_rows"], 120);
        }
        assert_eq!(summary["privacy"]["epsilon"].is_null(), privacy == "off");
    }
}

#[test]
fn a_run_replaces_what_an_earlier_one_left() {
    let recorded = Recorded::sites(2);
    recorded.simulate("out", "--seed 1");
    let again = recorded.simulate("out", "--seed 1");
    assert_eq!(
        again["rounds"], 1,
        "the ledgers of the first run stood in the way"
    );
}

#[test]
fn deltas_move_the_network_in_every_round_and_are_charged_for_each() {
    let recorded = Recorded::sites(3);
    let line = "--recipe delta --rounds 2 --local-steps 3 --server-rate 0.5 --server-momentum 0.5";
    for privacy in ["off", "block"] {
        let summary = recorded.simulate(privacy, &format!("{line} --privacy {privacy}"));
        assert_eq!(
            (&summary["rounds"], &summary["refusals"]),
            (&2.into(), &serde_json::json!({})),
            "{privacy}"
        );
        let digests: Vec<_> = recorded
            .rounds(privacy)
            .iter()
            .map(|r| r["model_digest"].clone())
            .collect();
        assert_ne!(
            digests[0], digests[1],
            "{privacy}: the second round changed nothing"
        );
    }
    let epsilon = recorded.simulate("block", line)["privacy"]["epsilon"]
        .as_f64()
        .unwrap();
    assert!(
        (3.9..=4.0).contains(&epsilon),
        "two releases of all rows within the budget: {epsilon}"
    );
}

#[test]
fn gradients_step_in_every_round_and_twenty_are_within_the_budget() {
    let recorded = Recorded::sites(3);
    for privacy in ["off", "block"] {
        let summary = recorded.simulate(privacy, &format!("--recipe gradient --privacy {privacy}"));
        assert_eq!(
            (&summary["rounds"], &summary["refusals"]),
            (&20.into(), &serde_json::json!({})),
            "{privacy}"
        );
        let digests: std::collections::BTreeSet<String> = recorded
            .rounds(privacy)
            .iter()
            .map(|r| r["model_digest"].to_string())
            .collect();
        assert_eq!(digests.len(), 20, "{privacy}: a round changed nothing");
        let epsilon = &summary["privacy"]["epsilon"];
        match epsilon.as_f64() {
            Some(epsilon) => assert!((3.9..=4.0).contains(&epsilon), "{epsilon}"),
            None => assert_eq!(privacy, "off"),
        }
    }
}

/// The same rounds as an edge and an aggregator go through, without noise and with a clip that is hardly felt: they lead to
/// the least squares of all rows in one place.
#[test]
fn a_federation_of_gradients_comes_close_to_the_central_ridge() {
    let recorded = Recorded::sites(3);
    recorded.simulate("few", "--recipe gradient --privacy off --rounds 10");
    recorded.simulate("many", "--recipe gradient --privacy off --rounds 300");
    let fleet = super::data::load(recorded.dir.path(), &[]).unwrap();
    let mut equations = LocalDescent::new(CHANNELS);
    for site in &fleet.sites {
        site.block_rows(&fleet.schema)
            .iter()
            .for_each(|block| equations.add(block));
    }
    // Where the gradient of the pooled loss is; at the least squares it vanishes.
    let slope = |out: &str| {
        let detector = Detector::load(&recorded.out(out).join("model"), "a").unwrap();
        let weights = detector.options().full_prior.clone().unwrap();
        let gradient = equations.descend(&weights, 1, 0.0);
        gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt()
    };
    let (few, many) = (slope("few"), slope("many"));
    assert!(many < 0.05 * few, "{many} against {few}");

    // `--mode central` solves for the same weights at once, but for how much it leans on the public constant.
    recorded.simulate("central", "--recipe gradient --mode central --privacy off");
    let central = Detector::load(&recorded.out("central").join("model"), "a").unwrap();
    let pooled = |lambda| super::data::pooled_linear(&fleet.sites, &fleet.schema, lambda).unwrap();
    assert_eq!(central.options().full_prior, Some(pooled(1000.0)));
    let constant = FullWeights::of_own_lag(&OwnLagWeights::public_constant(CHANNELS));
    let size = |weights: &FullWeights| {
        let gradient = equations.descend(weights, 1, 0.0);
        gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt()
    };
    let (began, solved) = (size(&constant), size(&pooled(0.0)));
    assert!(solved < 1e-3 * began, "{solved} of {began}");
}

#[test]
fn several_cold_starts_meet_the_same_model() {
    let recorded = Recorded::sites(3);
    recorded.simulate(
        "both",
        "--recipe gradient --rounds 3 --privacy off --cold-start 60,120",
    );
    recorded.simulate(
        "one",
        "--recipe gradient --rounds 3 --privacy off --cold-start 120",
    );
    let rows = |out: &str| recorded.array(&format!("{out}/scores/b.npy")).values;
    assert_eq!(rows("both/cold-120"), rows("one"));
    assert_ne!(rows("both/cold-60"), rows("one"));
    let summary = fs::read_to_string(recorded.out("both/cold-60/summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["arguments"]["cold_start"], 60);
    assert_eq!(summary["by_site"]["c"]["train_rows"], 60);
}

#[test]
fn one_local_step_is_a_round_of_gradients_and_a_strong_proximal_term_holds_sites_back() {
    let recorded = Recorded::sites(2);
    let run = |out: &str, line: &str| {
        recorded.simulate(out, &format!("--recipe gradient --privacy off --rounds 2 {line}"));
        let detector = Detector::load(&recorded.out(out).join("model"), "a").unwrap();
        detector.options().full_prior.clone().unwrap().values().to_vec()
    };
    let far = |a: &[f32], b: &[f32]| {
        let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let (plain, once) = (run("plain", ""), run("once", "--local-steps 1"));
    assert!(far(&plain, &once) < 1e-3, "{}", far(&plain, &once));
    let (many, held) = (
        run("many", "--local-steps 20"),
        run("held", "--local-steps 20 --proximal 30"),
    );
    assert!(far(&many, &once) > 2.0 * far(&held, &once));
}

#[test]
fn the_constant_learns_no_weight() {
    let recorded = Recorded::sites(1);
    recorded.simulate("constant", "--mode constant --cold-start 400");
    recorded.simulate("local", "--mode local --cold-start 400");
    let scores = |out: &str| recorded.array(&format!("{out}/scores/a.npy")).values;
    assert_ne!(scores("constant"), scores("local"));
}
