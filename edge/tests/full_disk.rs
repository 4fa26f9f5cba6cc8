//! A service whose health check writes, on a disk that fills at once or turns read-only: nobody restarts it, and it is well again when it can write.
//!
//! The service is this very test program, started again with an address in its environment: see `service_process`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, one that is left out says so"
)]

mod whole;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use whole::{ADDRESS, Edge, Limits, free_address, serve, service_argv};

/// Where the service writes before each answer.
const WRITES: &str = "THERIAC_TEST_SERVICE_WRITES";
const LIMITS: Limits = Limits {
    answer: Duration::from_mins(1),
    wait: Duration::from_mins(2),
};

/// Not a test of its own: with an address in the environment it is the service that the tests supervise.
#[test]
fn service_process() {
    let (Ok(address), Ok(file)) = (std::env::var(ADDRESS), std::env::var(WRITES)) else {
        return;
    };
    // As one does that wants to have the old one or the new one: what is written anew has the room of what was there.
    let new = format!("{file}.new");
    let beats = || std::fs::write(&new, vec![7; 20_000]).and_then(|()| std::fs::rename(&new, &file));
    serve(&address, || beats().is_ok());
}

/// A small file system in memory, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    /// Nothing where none can be mounted, which is said.
    fn mount(path: PathBuf) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        if mount(&["-t", "tmpfs", "-o", "size=32m,mode=0755", "tmpfs"], &path) {
            return Some(Self(path));
        }
        println!("left out: no file system can be mounted here (root may)");
        None
    }

    /// Takes every byte.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("big")).unwrap();
        let mut block = 1 << 20;
        while block > 0 {
            if file.write_all(&vec![0; block]).is_err() {
                block /= 2;
            }
        }
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.join("big")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

fn mount(arguments: &[&str], path: &Path) -> bool {
    let mounted = Command::new("mount").args(arguments).arg(path).output();
    mounted.is_ok_and(|mounted| mounted.status.success())
}

fn service(disk: &Disk) -> String {
    let (free, argv) = (free_address(), service_argv());
    let state = disk.0.join("kv");
    std::fs::create_dir(&state).unwrap();
    let file = state.join("beat").display().to_string();
    format!(
        "healing.autonomy = 'act'\nhealing.cooldown = '0s'\n[[service]]\nname = 'kv'\nargv = {argv}\n\
         env = {{ {ADDRESS} = '{free}', {WRITES} = '{file}' }}\nstop_grace = '200ms'\n\
         probe = {{ url = 'http://{free}/', interval = '100ms', timeout = '10s' }}\n\
         state = {{ dir = '{}', interval = '1h' }}\n",
        state.display()
    )
}

/// Several rounds of trouble that begins between two looks, whenever that is.
async fn is_left_alone(disk: &Disk, root: &Path, class: &str, begins: impl Fn(), ends: impl Fn()) {
    let edge = Edge::start(&root.join("state"), &service(disk), LIMITS);
    let pid = edge.service_until("well", |service| service.healthy).await.pid;
    for round in 0..3 {
        begins();
        edge.until("told", async |edge| {
            let incidents = edge.incidents().await?;
            (incidents.len() > round).then_some(())
        })
        .await;
        edge.service_until("seen not to answer", |service| !service.healthy)
            .await;
        ends();
        edge.until("recovered", async |edge| {
            let incidents = edge.incidents().await?;
            let open = incidents.iter().any(|found| found.state != "recovered");
            (!open).then_some(())
        })
        .await;
    }
    let incidents = edge.incidents().await.unwrap();
    for incident in &incidents {
        assert!(incident.actions.is_empty(), "{incident:?}");
        assert_eq!(incident.class, class, "{incident:?}");
    }
    assert_eq!(edge.service().await.unwrap().pid, pid);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_at_once_costs_a_service_that_writes_no_restart() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(root.path().join("disk")) else {
        return;
    };
    is_left_alone(&disk, root.path(), "disk_full", || disk.fill(), || disk.empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_costs_a_service_that_writes_no_restart() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(root.path().join("disk")) else {
        return;
    };
    let remount = |how: &str| assert!(mount(&["-o", &format!("remount,{how}")], &disk.0));
    is_left_alone(
        &disk,
        root.path(),
        "read_only_fs",
        || remount("ro"),
        || remount("rw"),
    )
    .await;
}
