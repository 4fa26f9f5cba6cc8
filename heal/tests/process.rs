//! The supervisor against real processes: ones that die, hang, ignore TERM, leave others behind, and outlive their supervisor.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;
use theriac_heal::executor::process::{
    Leftover, OutputTo, ProcessError, ServiceExit, ServiceSpec, Supervisor, process_state,
};
use theriac_heal::incident::ProcessState;

const PATIENCE: Duration = Duration::from_secs(40);
/// For [`Pair`].
const TWO_SLEEP: &str = "sh -c 'echo $$ > ORPHAN; exec sleep 60' & exec sleep 60";

fn shell(script: &str) -> ServiceSpec {
    let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    ServiceSpec {
        stop_grace: Duration::from_millis(300),
        start_spacing: Duration::ZERO,
        ..ServiceSpec::new("test", argv)
    }
}

fn supervisor(dir: &TempDir, script: &str) -> Supervisor {
    Supervisor::new(shell(script), dir.path().join("child.json"))
}

/// A service that began a second process of its group.
struct Pair {
    script: String,
    service: Supervisor,
    pid: u32,
    orphan: u32,
}

impl Pair {
    /// `ORPHAN` in the script is the file that the second process writes its id to.
    async fn start(dir: &TempDir, script: &str) -> Self {
        let orphan = dir.path().join("orphan");
        let script = script.replace("ORPHAN", &orphan.display().to_string());
        let mut service = supervisor(dir, &script);
        let pid = service.start().await.unwrap();
        let orphan = file_with_pid(&orphan).await;
        Self {
            script,
            service,
            pid,
            orphan,
        }
    }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// Neither running nor a zombie of ours.
fn gone(pid: u32) -> bool {
    test_kill_process(Pid::from_raw(pid.cast_signed()).unwrap()).is_err() || process_state(pid).is_none()
}

/// Waits for `done`, with a deadline and without assuming how long anything takes.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn file_with_pid(path: &Path) -> u32 {
    let mut pid = None;
    until("the script to write a process id", || {
        pid = std::fs::read_to_string(path)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        pid.is_some()
    })
    .await;
    pid.unwrap()
}

#[tokio::test]
async fn tells_how_a_service_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = supervisor(&dir, "exit 7");
    service.start().await.unwrap();
    assert_eq!(service.exited().await, ServiceExit::Code(7));
    assert_eq!(service.pid(), None);

    let mut service = supervisor(&dir, "exec sleep 60");
    let pid = service.start().await.unwrap();
    signal(pid, Signal::KILL);
    let begun = Instant::now();
    assert_eq!(service.exited().await, ServiceExit::Signal(9));
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "an exit is told, not polled for: {:?}",
        begun.elapsed()
    );
    assert!(gone(pid), "a dead child is reaped");
    assert_eq!(service.starts(), 1);
}

#[tokio::test]
async fn waiting_for_an_exit_can_be_cancelled_and_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = supervisor(&dir, "exec sleep 60");
    let pid = service.start().await.unwrap();
    for _ in 0..3 {
        assert!(
            tokio::time::timeout(Duration::from_millis(10), service.exited())
                .await
                .is_err()
        );
    }
    signal(pid, Signal::KILL);
    assert_eq!(service.exited().await, ServiceExit::Signal(9));
}

#[tokio::test]
async fn a_service_that_obeys_term_is_not_killed() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let script = format!(
        "trap 'exit 0' TERM; echo $$ > {}; while :; do sleep 0.05; done",
        ready.display()
    );
    let mut service = Supervisor::new(
        ServiceSpec {
            stop_grace: PATIENCE,
            ..shell(&script)
        },
        dir.path().join("child.json"),
    );
    service.start().await.unwrap();
    file_with_pid(&ready).await;
    let stopped = service.stop().await.unwrap();
    assert_eq!(
        (stopped.exit, stopped.killed),
        (Some(ServiceExit::Code(0)), false)
    );
}

#[tokio::test]
async fn a_service_that_ignores_term_is_killed_after_the_grace() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let mut service = supervisor(
        &dir,
        &format!(
            "trap '' TERM; echo $$ > {}; while :; do sleep 0.05; done",
            ready.display()
        ),
    );
    let pid = service.start().await.unwrap();
    file_with_pid(&ready).await;
    let stopped = service.stop().await.unwrap();
    assert_eq!(
        (stopped.exit, stopped.killed),
        (Some(ServiceExit::Signal(9)), true)
    );
    assert!(stopped.took >= Duration::from_millis(300) && gone(pid));
}

#[tokio::test]
async fn a_stopped_service_is_killed_without_waiting_for_the_grace() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = Supervisor::new(
        ServiceSpec {
            stop_grace: Duration::from_mins(1),
            ..shell("exec sleep 60")
        },
        dir.path().join("child.json"),
    );
    let pid = service.start().await.unwrap();
    assert_eq!(process_state(pid), Some(ProcessState::Alive));
    signal(pid, Signal::STOP);
    until("the process to stop", || {
        process_state(pid) == Some(ProcessState::Stopped)
    })
    .await;
    let stopped = service.stop().await.unwrap();
    assert_eq!(
        (stopped.exit, stopped.killed),
        (Some(ServiceExit::Signal(9)), true)
    );
    assert!(stopped.took < PATIENCE && gone(pid));
}

#[tokio::test]
async fn nobody_of_the_group_survives_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    let script = "sh -c 'trap \"\" TERM; echo $$ > ORPHAN; while :; do sleep 0.05; done' & wait";
    let mut pair = Pair::start(&dir, script).await;
    let stopped = pair.service.stop().await.unwrap();
    assert!(stopped.killed && gone(pair.pid) && gone(pair.orphan));
}

#[tokio::test]
async fn what_a_dead_service_left_behind_is_ended_before_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let (orphan, count) = (dir.path().join("orphan"), dir.path().join("count"));
    // Each start says how many of its kind were there before it, then leaves one behind.
    let script = format!(
        "sh -c 'echo $$ > {orphan}; exec sleep 60' & while [ ! -s {orphan} ]; do sleep 0.01; done; echo x >> {count}; exec sleep 60",
        orphan = orphan.display(),
        count = count.display()
    );
    let mut service = supervisor(&dir, &script);
    let first = service.start().await.unwrap();
    let left = file_with_pid(&orphan).await;
    until("the first start", || count.exists()).await;
    signal(first, Signal::KILL);
    service.exited().await;
    assert!(!gone(left), "the orphan lives on until somebody ends it");
    let second = service.start().await.unwrap();
    assert!(gone(left) && !gone(second));
    assert!(service.stop().await.unwrap().exit.is_some());
}

#[tokio::test]
async fn starting_twice_and_running_nothing_are_errors_with_words() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = supervisor(&dir, "exec sleep 60");
    let pid = service.start().await.unwrap();
    assert!(
        matches!(service.start().await, Err(ProcessError::Running { pid: running, .. }) if running == pid)
    );
    service.stop().await.unwrap();

    let missing = ServiceSpec::new("kv", vec!["/nowhere/kv".to_owned()]);
    let mut service = Supervisor::new(missing, dir.path().join("other.json"));
    let error = service.start().await.unwrap_err().to_string();
    assert!(error.contains("kv") && error.contains("/nowhere/kv"), "{error}");
    let mut service = Supervisor::new(ServiceSpec::new("kv", Vec::new()), dir.path().join("other.json"));
    assert!(matches!(
        service.start().await,
        Err(ProcessError::NoProgram { .. })
    ));
    assert!(matches!(service.stop().await, Ok(stopped) if stopped.exit.is_none()));
}

#[tokio::test]
async fn starts_are_spaced() {
    let dir = tempfile::tempdir().unwrap();
    let spacing = Duration::from_millis(150);
    let mut service = Supervisor::new(
        ServiceSpec {
            start_spacing: spacing,
            ..shell("exit 1")
        },
        dir.path().join("child.json"),
    );
    let begun = Instant::now();
    for _ in 0..3 {
        service.start().await.unwrap();
        service.exited().await;
    }
    assert!(begun.elapsed() >= 2 * spacing, "{:?}", begun.elapsed());
}

/// Until the shell has become this program: while it does, a reader of /proc sees neither of the two.
async fn runs(pid: u32, program: &str) {
    let comm = format!("/proc/{pid}/comm");
    until("the program runs", || {
        std::fs::read_to_string(&comm).unwrap().trim_end() == program
    })
    .await;
}

#[tokio::test]
async fn a_later_run_adopts_the_running_child_and_sees_it_end() {
    for without_record in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("child.json");
        let mut earlier = supervisor(&dir, "exec sleep 60");
        let pid = earlier.start_for(Some(42)).await.unwrap();
        runs(pid, "sleep").await;
        drop(earlier);
        if without_record {
            // The earlier run died between the start and the writing of its record.
            std::fs::remove_file(&record).unwrap();
        }
        let mut later = Supervisor::new(shell("exec sleep 60"), record);
        assert_eq!(later.take_over().await.unwrap(), Leftover::Adopted { pid });
        assert_eq!(
            (later.pid(), later.started_for()),
            (Some(pid), (!without_record).then_some(42))
        );
        signal(pid, Signal::KILL);
        assert_eq!(later.exited().await, ServiceExit::Unknown);
        let second = later.start().await.unwrap();
        assert_ne!(second, pid);
        later.stop().await.unwrap();
    }
}

#[tokio::test]
async fn an_adopted_child_can_be_stopped_wholly() {
    let dir = tempfile::tempdir().unwrap();
    let earlier = Pair::start(&dir, TWO_SLEEP).await;
    let (script, pid, orphan) = (earlier.script, earlier.pid, earlier.orphan);
    drop(earlier.service);
    let mut later = supervisor(&dir, &script);
    assert_eq!(later.take_over().await.unwrap(), Leftover::Adopted { pid });
    let stopped = later.stop().await.unwrap();
    assert_eq!(stopped.exit, Some(ServiceExit::Unknown));
    assert!(gone(pid) && gone(orphan));
}

#[tokio::test]
async fn a_later_run_clears_what_a_dead_child_left() {
    let dir = tempfile::tempdir().unwrap();
    let mut earlier = Pair::start(&dir, TWO_SLEEP).await;
    signal(earlier.pid, Signal::KILL);
    earlier.service.exited().await;
    let (script, orphan) = (earlier.script, earlier.orphan);
    drop(earlier.service);
    let mut later = supervisor(&dir, &script);
    assert_eq!(
        later.take_over().await.unwrap(),
        Leftover::Cleared { processes: 1 }
    );
    assert!(gone(orphan));
    assert_eq!(later.take_over().await.unwrap(), Leftover::None);
}

#[tokio::test]
async fn a_helper_that_left_for_a_session_of_its_own_is_neither_the_service_nor_ended() {
    for without_record in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (helper, record) = (dir.path().join("helper"), dir.path().join("child.json"));
        // As an agent does that a service calls once: it has the service's environment, and so its mark.
        let script = format!(
            "setsid sh -c 'echo $$ > {}; exec sleep 60' & exec sleep 60",
            helper.display()
        );
        let mut earlier = supervisor(&dir, &script);
        let pid = earlier.start_for(Some(42)).await.unwrap();
        let helper = file_with_pid(&helper).await;
        signal(pid, Signal::KILL);
        earlier.exited().await;
        drop(earlier);
        if without_record {
            std::fs::remove_file(&record).unwrap();
        }
        let mut later = supervisor(&dir, &script);
        assert_eq!(later.take_over().await.unwrap(), Leftover::None);
        assert_eq!((later.pid(), later.started_for()), (None, None));
        assert!(!gone(helper), "it is none of ours");
        // Where both live it is the service that is taken over.
        let second = later.start().await.unwrap();
        runs(second, "sleep").await;
        drop(later);
        std::fs::remove_file(&record).unwrap();
        let mut last = supervisor(&dir, &script);
        assert_eq!(last.take_over().await.unwrap(), Leftover::Adopted { pid: second });
        last.stop().await.unwrap();
        signal(helper, Signal::KILL);
    }
}

#[tokio::test]
async fn a_record_that_names_somebody_elses_process_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("child.json");
    let stranger = tokio::process::Command::new("/bin/sleep")
        .arg("60")
        // It leads a group, as one may that got the number of ours after that was gone.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let stranger_pid = stranger.id().unwrap();
    // The kernel tells when a process began in hundredths of a second: two within one of them look alike.
    let began = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.to_owned();
        fields.split_ascii_whitespace().nth(19).unwrap().to_owned()
    };
    let (real, text) = loop {
        let mut service = supervisor(&dir, "exec sleep 60");
        let real = service.start().await.unwrap();
        let text = std::fs::read_to_string(&record).unwrap();
        let apart = began(real) != began(stranger_pid);
        service.stop().await.unwrap();
        if apart {
            break (real, text);
        }
    };
    std::fs::write(
        &record,
        text.replace(&real.to_string(), &stranger_pid.to_string()),
    )
    .unwrap();
    let mut later = supervisor(&dir, "exec sleep 60");
    let taken = later.take_over().await.unwrap();
    assert_eq!(taken, Leftover::None);
    assert!(!gone(stranger_pid), "a stranger was killed");
    std::fs::write(&record, "{\"pid\": 1, cut").unwrap();
    assert_eq!(later.take_over().await.unwrap(), Leftover::None);
    drop(stranger);
}

#[tokio::test]
async fn output_goes_to_a_file_that_is_bounded_at_each_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.log");
    let output = OutputTo::File {
        path: path.clone(),
        bytes_max: 20,
    };
    let spec = ServiceSpec {
        output,
        ..shell("echo hello from $0; echo trouble >&2; echo $GREETING")
    };
    let spec = ServiceSpec {
        env: [("GREETING".to_owned(), "hi".to_owned())].into(),
        ..spec
    };
    let mut service = Supervisor::new(spec, dir.path().join("child.json"));
    service.start().await.unwrap();
    service.exited().await;
    let first = std::fs::read_to_string(&path).unwrap();
    assert_eq!(first, "hello from /bin/sh\ntrouble\nhi\n");
    service.start().await.unwrap();
    service.exited().await;
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        first,
        "the file began anew"
    );
    assert_eq!(
        std::fs::read_to_string(dir.path().join("out.log.old")).unwrap(),
        first
    );
}
