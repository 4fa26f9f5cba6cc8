//! A site that lies in round after round: what becomes of it, what the operator is told, and whether the past can be done again.

#![expect(clippy::unwrap_used, reason = "helpers of tests: one that cannot go on fails")]

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_aggregator::config::{
    LimitSettings, ModelSettings, OptimizerSettings, RoundKind, RoundSettings, Settings,
};
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::server_optimizer::OptimizerName;
use theriac_certs::Identity;
use theriac_lab::attack::Attack;
use theriac_lab::hostile::tamper;
use theriac_protocol::message::{AnnounceV1, ToEdge};
use theriac_protocol::refusal::RoundOutcome;
use theriac_protocol::units::Round;
use theriac_transport::EdgeSession;

use crate::fleet::Centre;
use crate::page;
use crate::site::{self, Site, enrol};

const VALUES: u32 = 400;
/// Standard deviation of the noise on each value: clip norm 10, noise multiplier 1.
const NOISE: f32 = 10.0;
const NAMES: [&str; 5] = ["liar", "press-1", "press-2", "press-3", "press-4"];
/// Rounds whose updates are kept.
const KEPT: u64 = 40;

fn settings() -> Settings {
    Settings {
        rounds: RoundSettings {
            kind: RoundKind::Delta,
            rule: RuleName::TRIMMED_MEAN,
            // All of them: no round opens without the liar, whose refused update counts towards it.
            quorum: 5,
            byzantine: 1,
            deadline: Duration::from_mins(5),
            pause: Duration::ZERO,
            clip_norm: Some(10.0),
            noise_multiplier: Some(1.0),
            ..RoundSettings::default()
        },
        model: ModelSettings {
            dimension: Some(VALUES),
            ..ModelSettings::default()
        },
        limits: LimitSettings {
            rounds_kept: KEPT,
            ..LimitSettings::default()
        },
        server_optimizer: OptimizerSettings {
            name: OptimizerName::FedAdam,
            rate: 0.01,
            ..OptimizerSettings::default()
        },
        ..Settings::default()
    }
}

/// One site in its session.
struct Player {
    site: Site,
    session: EdgeSession,
    announced: Option<AnnounceV1>,
    random: ChaCha8Rng,
}

impl Player {
    async fn announcement(&mut self) -> AnnounceV1 {
        loop {
            if let Some(announce) = self.announced.take() {
                return announce;
            }
            if let ToEdge::Announce(announce) = site::next(&mut self.session).await.unwrap() {
                self.announced = Some(announce);
            }
        }
    }

    /// What an honest site sends: a signal of norm 10 and the noise.
    fn honest(&mut self) -> Vec<f32> {
        let mut normal = || {
            let (u, v): (f32, f32) = (self.random.random(), self.random.random());
            (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
        };
        (0..VALUES).map(|_| 0.5 + NOISE * normal()).collect()
    }

    async fn closed(&mut self, round: Round) -> RoundOutcome {
        loop {
            match site::next(&mut self.session).await.unwrap() {
                ToEdge::Closed(closed) if closed.round == round => return closed.outcome,
                ToEdge::Announce(announce) => self.announced = Some(announce),
                _ => {}
            }
        }
    }
}

async fn connect(players: &mut Vec<Player>, centre: &Centre, identities: &[Identity]) {
    for (number, identity) in (0_u64..).zip(identities) {
        let old = players
            .iter()
            .position(|player| player.site.name() == identity.name().node.as_str());
        let (site, random) = match old.map(|at| players.remove(at)) {
            Some(old) => (old.site, old.random),
            None => (
                Site::of(centre, identity, VALUES),
                ChaCha8Rng::seed_from_u64(number),
            ),
        };
        let (session, announced) = site.connect_at_last(None).await;
        players.push(Player {
            site,
            session,
            announced,
            random,
        });
    }
}

/// Everybody sends once; the first of them, if it lies, the opposite of what it should, five times as strong.
async fn round(players: &mut [Player], lies: bool) -> (Round, AnnounceV1) {
    let mut last = None;
    for (number, player) in players.iter_mut().enumerate() {
        let announce = player.announcement().await;
        let mut values = player.honest();
        if lies && number == 0 {
            values = tamper(Attack::SIGN_FLIP)(announce.round, values);
        }
        let update = player.site.update(&announce, values);
        update.send(&mut player.session).await.unwrap();
        last = Some(announce);
    }
    let announce = last.unwrap();
    for player in players {
        let outcome = player.closed(announce.round).await;
        assert!(matches!(outcome, RoundOutcome::Published(_)), "{outcome:?}");
    }
    (announce.round, announce)
}

fn standing(centre: &Centre, site: &str) -> Option<u64> {
    let sites = centre.status().sites;
    sites
        .into_iter()
        .find(|row| row.name == site)
        .unwrap()
        .quarantined_since
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persistent_liar_ends_in_quarantine_is_explained_and_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let mut centre = Centre::of(root.path(), &root.path().join("centre"), settings());
    let identities = enrol(&centre, &NAMES);
    centre.serve();
    let mut players = Vec::new();
    connect(&mut players, &centre, &identities).await;
    for _ in 0..2 {
        round(&mut players, false).await;
    }
    let mut caught = None;
    while caught.is_none() {
        let (at, _) = round(&mut players, true).await;
        assert!(at.0 < 10, "not caught within eight rounds");
        caught = standing(&centre, "liar");
    }
    for honest in &NAMES[1..] {
        assert_eq!(standing(&centre, honest), None);
    }

    // Why was this site rejected?
    let said = centre.run(&["sites", "show", "liar"]).expect_done().stdout;
    for wanted in [
        "liar: active, in quarantine since round",
        "norm_exceeded",
        "it leaves at 0.70",
        "sites suspend liar",
    ] {
        assert!(said.contains(wanted), "{wanted} is not in\n{said}");
    }
    let listed = centre.run(&["sites", "list"]).expect_done().stdout;
    assert!(listed.contains("quarantine 0."), "{listed}");
    let shown = page::text(centre.page, "/");
    assert!(
        shown.contains("<span class=\"bad\">liar</span> since round") && shown.contains("norm_exceeded"),
        "{shown}"
    );
    let metrics = page::text(centre.page, "/metrics");
    for wanted in [
        "quarantine_entered_total 1",
        "quarantined_sites 1",
        "quarantine_held_total 0",
    ] {
        assert!(metrics.contains(wanted), "{wanted} is not in\n{metrics}");
    }

    // It behaves, is scored at weight 0, also after kill -9, and the model is the one of the others.
    centre.kill();
    centre.serve();
    connect(&mut players, &centre, &identities).await;
    let (at, _) = round(&mut players, false).await;
    let number = at.0.to_string();
    let shown = centre
        .run(&["rounds", "show", &number, "--format", "json"])
        .expect_done()
        .json();
    let liar = &shown["decisions"][0];
    assert_eq!(
        (&liar["site"], &liar["decision"], &liar["weight"]),
        (&"liar".into(), &"quarantined".into(), &0.into())
    );
    assert!(
        liar["features"]["distance"].as_f64().unwrap() > 0.0,
        "it is still scored: {liar}"
    );
    assert_eq!(shown["decisions"][1]["weight"], 1);
    let again = centre
        .run(&["rounds", "replay", &number, "--format", "json"])
        .expect_done()
        .json();
    assert_eq!((&again["combined"], &again["left_out"]), (&4.into(), &1.into()));

    // Nineteen rounds as honest ones are, at most, and it counts again.
    let mut rounds = 0;
    while standing(&centre, "liar").is_some() {
        rounds += 1;
        assert!(rounds <= 19, "it is still in quarantine");
        round(&mut players, false).await;
    }
    let (last, _) = round(&mut players, false).await;
    for number in 1..=last.0 {
        centre
            .run(&["rounds", "replay", &number.to_string()])
            .expect_done();
    }

    // A model is taken back: the next round builds on it, without the memory that the optimiser had of what came after.
    centre.run(&["models", "rollback", "2"]).expect_done();
    let back = last.0 + 1;
    let (at, announce) = loop {
        // One round may have opened on the old model; the roll-back ends it.
        let open = players[0].announcement().await;
        let rolled = open.base_version.0 == back;
        players[0].announced = rolled.then_some(open);
        if rolled {
            for player in &mut players[1..] {
                while player
                    .announced
                    .as_ref()
                    .is_none_or(|open| open.base_version.0 != back)
                {
                    player.announced = None;
                    let open = player.announcement().await;
                    player.announced = Some(open);
                }
            }
            break round(&mut players, false).await;
        }
    };
    assert_eq!(announce.base_version.0, back);
    assert_eq!(centre.published(back), centre.published(2));
    centre.run(&["rounds", "replay", &at.0.to_string()]).expect_done();

    // Somebody writes to the files: each of it is found, and is not taken for what is only deleted.
    drop(players);
    centre.stop();
    let replay = |code| {
        let ended = centre.run(&["rounds", "replay", &number]).expect_code(code);
        ended.stderr
    };
    let change = |statement: &str| {
        let mut database = centre.database();
        let changed = database
            .write(|work| Ok(work.connection().execute(statement, [])?))
            .unwrap();
        assert!(changed > 0, "{statement}");
    };
    replay(0);
    change(&format!(
        "UPDATE upload SET payload = zeroblob(length(payload)) WHERE round = {number} AND node = 'press-2'"
    ));
    let said = replay(1);
    assert!(said.contains("TH-E0723") && said.contains("tampered"), "{said}");
    // With the digest beside it as well: the record of the decision still has the other one.
    let mut database = centre.database();
    let swapped = database.write(|work| {
        let payload: Vec<u8> = work.connection().query_row(
            &format!("SELECT payload FROM upload WHERE round = {number} AND node = 'press-2'"),
            [],
            |row| row.get(0),
        )?;
        let digest = theriac_protocol::units::Digest::of(&payload);
        let statement =
            format!("UPDATE upload SET payload_digest = ?1 WHERE round = {number} AND node = 'press-2'");
        Ok(work.connection().execute(&statement, [digest.0])?)
    });
    assert_eq!(swapped.unwrap(), 1);
    let said = replay(1);
    assert!(said.contains("different: the round gives model"), "{said}");
    change(&format!(
        "UPDATE decision SET record = replace(record, '\"weight\":0', '\"weight\":1') WHERE round = {number} AND node = 'liar'"
    ));
    let said = replay(1);
    assert!(
        said.contains("was changed") && said.contains("site liar"),
        "{said}"
    );
    change(&format!(
        "DELETE FROM decision WHERE round = {number} AND node = 'liar'"
    ));
    let said = replay(1);
    assert!(said.contains("does not continue the one before it"), "{said}");
}

/// Pruned is not tampered: another exit code, and what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_whose_updates_are_gone_cannot_be_done_again_and_says_so() {
    let root = tempfile::tempdir().unwrap();
    let mut centre = Centre::of(
        root.path(),
        &root.path().join("centre"),
        Settings {
            limits: LimitSettings {
                rounds_kept: 2,
                records_kept: 4,
                ..LimitSettings::default()
            },
            ..settings()
        },
    );
    let identities = enrol(&centre, &NAMES);
    centre.serve();
    let mut players = Vec::new();
    connect(&mut players, &centre, &identities).await;
    for _ in 0..8 {
        round(&mut players, false).await;
    }
    centre.run(&["rounds", "replay", "8"]).expect_done();
    let pruned = centre.run(&["rounds", "replay", "5"]).expect_code(3).stderr;
    assert!(
        pruned.contains("TH-E0724") && pruned.contains("cannot: payloads pruned"),
        "{pruned}"
    );
    let forgotten = centre.run(&["rounds", "replay", "2"]).expect_code(3).stderr;
    assert!(forgotten.contains("limits.records_kept"), "{forgotten}");
    let shown = centre.run(&["rounds", "show", "2"]).expect_done().stdout;
    assert!(
        shown.contains("press-1") && shown.contains("limits.records_kept"),
        "{shown}"
    );
    drop(players);
    centre.stop();
}
