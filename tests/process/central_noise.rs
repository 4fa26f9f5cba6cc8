//! Noise of the centre under kill −9, and at the end of its budget.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_aggregator::central::CentralStatus;
use theriac_aggregator::config::{RoundSettings, load};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::status::Status as CentreStatus;
use theriac_privacy::central::CentralLedger;
use theriac_protocol::units::Round;

use crate::child::PATIENCE;
use crate::fleet::Centre;
use crate::killed_aggregator::{Heard, take_part};
use crate::site::{Site, enrol};

const KILLS: usize = 8;

/// σ = 12 and ε = 6 pay for about 190 sums.
fn switch_on(centre: &Centre, sites: &str) {
    let text = std::fs::read_to_string(centre.config()).unwrap();
    let (before, section) = text.split_once("[central_noise]").unwrap();
    let section = section
        .replace("enabled = false", "enabled = true")
        .replace("epsilon = 4.0", "epsilon = 6.0")
        .replace("noise_multiplier = 1.0", "noise_multiplier = 12.0")
        .replace("# clip_norm = 1.0", "clip_norm = 2.0")
        .replace("# sites = 10000", sites);
    std::fs::write(centre.config(), format!("{before}[central_noise]{section}")).unwrap();
}

fn read(centre: &Centre) -> CentralStatus {
    let config = load(&centre.config(), []).unwrap();
    CentralStatus::read(&config).unwrap().unwrap()
}

/// Every published round was charged before, whenever the aggregator was killed; once the budget is spent no round opens, the model
/// stays, and no restart brings a round back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_loses_a_charge_and_a_spent_budget_ends_the_rounds() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("centre");
    let mut centre = Centre::bare(
        root.path(),
        &dir,
        RoundSettings {
            quorum: 2,
            deadline: Duration::from_secs(20),
            pause: Duration::ZERO,
            ..RoundSettings::default()
        },
    );
    switch_on(&centre, "sites = 2");
    for said in [
        centre.run(&["check-config"]).expect_done().stdout,
        centre.run(&["status"]).stdout,
    ] {
        assert!(said.contains("TRUST this aggregator"), "{said}");
    }
    let identities = enrol(&centre, &["a", "b"]);
    centre.serve();
    let heard = Arc::new(Mutex::new(Heard::default()));
    let mut tasks = tokio::task::JoinSet::new();
    for (identity, value) in identities.iter().zip([1.0, 3.0]) {
        let name = identity.name().node.to_string();
        let site = Site::new(&centre, identity);
        tasks.spawn(take_part(site, name, value, Arc::clone(&heard)));
    }
    let ledger = DataDir::new(&dir).central_ledger();
    let promised = || heard.lock().unwrap().receipts.len();
    let seed = 11;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut charged, mut kills) = (0, 0_u64);
    'kills: for kill in 0..KILLS {
        let (before, since) = (promised(), Instant::now());
        while promised() < before + 4 {
            // A quick machine may have spent all of it by now.
            if read(&centre).exhausted {
                break 'kills;
            }
            assert!(since.elapsed() < PATIENCE, "no round after kill {kill}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        kills += 1;
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..20_000))).await;
        centre.kill();
        let now = read(&centre).rounds;
        assert!(now >= charged, "kill {kill}: {now} charges, {charged} before");
        charged = now;
        centre.serve();
    }
    let is_over = |status: &CentreStatus| {
        let spent = status.central_noise.as_ref().is_some_and(|noise| noise.exhausted);
        spent && status.phase == "closed"
    };
    let mut round = 0;
    let last = loop {
        let status = centre.until("another round, or the end of the budget", |status| {
            status.round > round || is_over(status)
        });
        if is_over(&status) {
            break status;
        }
        round = status.round;
    };
    let noise = last.central_noise.unwrap();
    assert!(
        noise.epsilon <= noise.epsilon_limit && noise.epsilon > 0.9 * noise.epsilon_limit,
        "{noise:?}"
    );
    assert!(noise.epsilon_pld <= noise.epsilon, "{noise:?}");
    // Every model that was ever published came of a round that had been charged.
    let mut published = 0_u64;
    for round in 1..=last.round {
        if centre.round(round).round.published.is_some() {
            published += 1;
            let charge = CentralLedger::charges_of(&ledger, Round(round)).unwrap();
            assert!(charge.is_some(), "round {round} was published and is not charged");
        }
    }
    assert!(
        kills >= 3 && published > 2 * kills,
        "{published} rounds were published, {kills} kills"
    );
    assert!(noise.rounds >= published, "{noise:?}, {published} published");
    let shown = centre.run(&["rounds", "show", "1"]).expect_done().stdout;
    assert!(shown.contains("must be trusted"), "{shown}");

    // A restart opens no further round, and the model stays.
    centre.kill();
    centre.serve();
    let after = centre.until("both sites", |status| status.connected.len() == 2);
    assert_eq!(
        (after.model_version, after.rounds_published, after.phase.as_str()),
        (last.model_version, last.rounds_published, "closed")
    );
    assert_eq!(read(&centre), noise);
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    centre.stop();

    // An older copy is found: the store knows how far the ledger had come.
    std::fs::remove_file(&ledger).unwrap();
    let refused = centre.run(&["serve"]).expect_code(78);
    assert!(refused.stderr.contains("TH-E0722"), "{}", refused.stderr);
    println!(
        "{published} rounds published, {} sums charged, {kills} kills",
        noise.rounds
    );
}
