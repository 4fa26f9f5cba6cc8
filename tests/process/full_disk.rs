//! A disk that is full: a small file system in memory, filled to the last byte. Mounting one takes root.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use theriac_aggregator::config::RoundSettings;
use theriac_edge::status::Storage;
use theriac_protocol::message::{DeclineReason, FetchModelV1, ToAggregator, ToEdge};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{ModelVersion, Round};
use theriac_transport::EdgeSession;
use tokio::runtime::Runtime;

use crate::child::until;
use crate::fleet::{Centre, Edge, Service};
use crate::page;
use crate::played::Played;
use crate::site::{self, Site, enrol};

/// A file system of its own, unmounted when dropped.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// `None`, with a word, where that is not allowed.
    fn mount(path: PathBuf, mib: u32) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let size = format!("size={mib}m,mode=0755");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&path)
            .output();
        if mounted.is_ok_and(|mounted| mounted.status.success()) {
            return Some(Self { path });
        }
        println!("left out: a full disk, because no file system can be mounted here (root may)");
        None
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Takes every byte that is left.
    fn fill(&self) {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.filler())
            .unwrap();
        for chunk in [1 << 20, 4096, 1] {
            let bytes = vec![0x5a_u8; chunk];
            loop {
                match file.write_all(&bytes) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a killed process may not be wholly gone.
        drop(Command::new("umount").arg("-l").arg(&self.path).status());
    }
}

/// Skips until the aggregator has answered an update.
async fn answer(session: &mut EdgeSession) -> Result<Round, RefusalCode> {
    loop {
        match site::next(session).await.unwrap() {
            ToEdge::Receipt(receipt) => return Ok(receipt.round),
            ToEdge::Refusal(refusal) => {
                assert!(
                    refusal.retry_after_ms > 0,
                    "{refusal:?} says no time to come back"
                );
                return Err(refusal.code);
            }
            _ => {}
        }
    }
}

#[test]
fn an_aggregator_without_room_refuses_uploads_and_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(root.path().join("disk"), 16) else {
        return;
    };
    let rounds = RoundSettings {
        quorum: 2,
        deadline: Duration::from_mins(2),
        pause: Duration::ZERO,
        rounds_max: Some(2),
        ..RoundSettings::default()
    };
    let mut centre = Centre::bare(root.path(), &disk.path.join("centre"), rounds);
    let identities = enrol(&centre, &["a", "b"]);
    centre.serve();
    let runtime = Runtime::new().unwrap();
    let receipts = runtime.block_on(async {
        let mut sites: Vec<Site> = identities
            .iter()
            .map(|identity| Site::new(&centre, identity))
            .collect();
        let [a, b] = sites.as_mut_slice() else { panic!() };
        let (mut to_a, _) = a.connect_at_last(None).await;
        let (mut to_b, round) = b.connect_at_last(None).await;
        let mut receipts = Vec::new();
        let announced = async |session: &mut EdgeSession, number| loop {
            if let ToEdge::Announce(announce) = site::next(session).await.unwrap()
                && announce.round == Round(number)
            {
                return announce;
            }
        };
        let first = match round {
            Some(round) => round,
            None => announced(&mut to_b, 1).await,
        };
        for (site, session) in [(&mut *a, &mut to_a), (&mut *b, &mut to_b)] {
            let update = site.update(&first, [1.0, 2.0, 3.0, 4.0]);
            update.send(session).await.unwrap();
            assert_eq!(answer(session).await, Ok(Round(1)));
            receipts.push((1, update.0.payload_digest));
        }
        let second = announced(&mut to_b, 2).await;
        let from_a = a.update(&second, [1.0, 1.0, 1.0, 1.0]);
        from_a.send(&mut to_a).await.unwrap();
        assert_eq!(answer(&mut to_a).await, Ok(Round(2)));
        receipts.push((2, from_a.0.payload_digest));

        disk.fill();
        let from_b = b.update(&second, [3.0, 3.0, 3.0, 3.0]);
        for _ in 0..3 {
            from_b.send(&mut to_b).await.unwrap();
            assert_eq!(answer(&mut to_b).await, Err(RefusalCode::StorageFull));
        }
        assert_eq!(centre.status().storage, "full");
        // Reads go on.
        let version = ModelVersion(1);
        to_a.send(&ToAggregator::FetchModel(FetchModelV1 { version }))
            .await
            .unwrap();
        while !matches!(site::next(&mut to_a).await.unwrap(), ToEdge::Model(..)) {}

        disk.empty();
        from_b.send(&mut to_b).await.unwrap();
        assert_eq!(answer(&mut to_b).await, Ok(Round(2)));
        receipts.push((2, from_b.0.payload_digest));
        receipts
    });
    centre.until("the second model", |status| status.rounds_published == 2);
    assert_eq!(centre.status().storage, "ok");
    centre.kill();
    for (round, digest) in receipts {
        let stored = centre.round(round).uploads;
        assert!(
            stored
                .iter()
                .any(|upload| upload.payload_digest == digest.to_string()),
            "{digest} of round {round} is lost"
        );
        assert_eq!(centre.published(round), centre.recomputed(Round(round)));
    }
    // All of it still serves.
    centre.serve();
    centre.stop();
}

/// Without a round nothing but an enrolment meets the full disk; monitoring and the new host must hear of it all the same.
#[test]
fn an_aggregator_without_room_says_so_when_only_an_enrolment_has_failed() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(root.path().join("disk"), 16) else {
        return;
    };
    let mut centre = Centre::bare(root.path(), &disk.path.join("centre"), RoundSettings::default());
    centre.serve();
    let edge = Edge::new(root.path(), "press-1", "");
    let token = centre.token("press-1", "1h");
    let ready = |centre: &Centre| page::ask("GET", centre.page, "/readyz", b"").unwrap().0;
    let gauge = |centre: &Centre, value: &str| {
        let (_, text) = page::ask("GET", centre.page, "/metrics", b"").unwrap();
        let line = format!("theriac_aggregator_storage_full {value}\n");
        String::from_utf8_lossy(&text).contains(&line)
    };
    assert!(ready(&centre) == 200 && gauge(&centre, "0"));

    disk.fill();
    edge.join(&centre, &token)
        .expect_problem(75, &["TH-E0315", "disk is full", "the token stays good"]);
    assert_eq!(centre.status().storage, "full");
    assert!(ready(&centre) == 503 && gauge(&centre, "1"));
    let said = centre.run(&["status"]).expect_code(1).stdout;
    assert!(said.contains("the disk is full"), "{said}");

    disk.empty();
    // Nobody writes: the aggregator finds out by itself.
    centre.until("word of the room", |status| status.storage == "ok");
    assert!(ready(&centre) == 200 && gauge(&centre, "0"));
    edge.join(&centre, &token).expect_done();
    let said = centre.run(&["status"]).expect_done().stdout;
    assert!(said.contains("waiting for 3 more of quorum 3"), "{said}");
    centre.stop();
}

#[test]
fn an_edge_without_room_keeps_watching_and_healing_and_sends_nothing() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(root.path().join("disk"), 100) else {
        return;
    };
    let runtime = Runtime::new().unwrap();
    let centre = runtime.block_on(async { Played::new() });
    let service = Service::new(root.path());
    let mut edge = Edge::on(root.path(), "press-1", &disk.path, "", &service.table("1h"));
    centre.enlist(&edge);
    edge.start();
    let (mut session, _) = runtime.block_on(centre.welcome(None));
    let well = |edge: &mut Edge| {
        let status = edge.until("a healthy service", |status| status.services[0].healthy);
        status.services[0].pid
    };
    let first = well(&mut edge);
    edge.until_rows(23);
    let ledger = edge.ledger();
    until("ballast to be put by", || {
        ballast(&disk.path).exists().then_some(())
    });

    disk.fill();
    let full = edge.until("word of the full disk", |status| status.storage == Storage::Full);
    let said = edge.run(&["status", "--format", "json"]).expect_code(1).json();
    assert_eq!(said["storage"], "full");
    let report = runtime.block_on(async {
        session.send(&ToEdge::Announce(centre.announce(1))).await.unwrap();
        centre.report(&mut session).await
    });
    let Some(ToAggregator::Decline(decline)) = report else {
        panic!("{report:?} from an edge with a full disk")
    };
    assert_eq!(decline.reason, DeclineReason::StorageUnavailable);
    assert_eq!(edge.ledger(), ledger, "a charge for an update that was not made");

    // It watches, and it heals: the ballast gives the room for what must be written first.
    edge.until_rows(full.rows + 5);
    service.kill();
    let next = edge.until("a new process", |status| {
        let service = &status.services[0];
        service.healthy && service.pid.is_some() && service.pid != first
    });
    assert_eq!(service.processes(), [next.services[0].pid.unwrap()]);
    assert_eq!(next.storage, Storage::Full);

    disk.empty();
    edge.until("room again", |status| status.storage == Storage::Ok);
    let report = runtime.block_on(async {
        session.send(&ToEdge::Announce(centre.announce(2))).await.unwrap();
        centre.report(&mut session).await
    });
    assert!(matches!(report, Some(ToAggregator::Update(..))), "{report:?}");
    edge.stop();
}

#[test]
fn an_edge_starts_again_and_is_told_to_stop_healing_on_a_full_disk() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(root.path().join("disk"), 100) else {
        return;
    };
    let service = Service::new(root.path());
    let mut edge = Edge::on(root.path(), "press-1", &disk.path, "", &service.table("1h"));
    edge.start();
    let well = |edge: &mut Edge| {
        let status = edge.until("a healthy service", |status| status.services[0].healthy);
        status.services[0].pid
    };
    let first = well(&mut edge);
    until("ballast to be put by", || {
        ballast(&disk.path).exists().then_some(())
    });
    edge.kill();
    disk.fill();

    // One that never ran there cannot, and says so.
    let other = Edge::on(root.path(), "press-2", &disk.path, "", "");
    let refused = other.run(&["run"]).expect_code(75);
    assert!(refused.stderr.contains("make room"), "{}", refused.stderr);

    edge.start();
    assert_eq!(well(&mut edge), first, "the service was taken over");
    disk.fill();
    edge.run(&["stop-healing"]).expect_done();
    edge.until("healing to be stopped", |status| status.healing_stopped);
    edge.run(&["resume-healing"]).expect_done();
    edge.until("healing to go on", |status| !status.healing_stopped);
    disk.empty();
    edge.until("room again", |status| status.storage == Storage::Ok);
    until("ballast again", || ballast(&disk.path).exists().then_some(()));

    // After an orderly end the store needs room for its files beside, which only the ballast has.
    edge.stop();
    disk.fill();
    edge.start();
    well(&mut edge);
    edge.stop();
}

fn ballast(disk: &Path) -> PathBuf {
    disk.join("press-1/ballast")
}
