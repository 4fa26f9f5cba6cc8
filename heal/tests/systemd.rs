//! A unit over D-Bus: a faithful systemd on the other end of a connection, and on a real bus where there is one.

#![cfg(feature = "systemd")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(
    missing_docs,
    reason = "the signals of an interface are a trait that its macro makes"
)]

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use theriac_heal::executor::systemd::{Bus, SystemdError, SystemdHands};
use theriac_heal::executor::unit::UnitName;
use theriac_heal::types::ActionKind;
use zbus::object_server::SignalEmitter;
use zbus::zvariant::OwnedObjectPath;
use zbus::{Connection, connection, fdo, interface};

/// What was asked, and how the next job ends.
#[derive(Debug, Default)]
struct Said {
    calls: Vec<String>,
    result: &'static str,
    load: &'static str,
    active: &'static str,
    denied: bool,
    silent: bool,
    subscribed: bool,
    loaded: String,
    id: String,
}

type Shared = Arc<Mutex<Said>>;

struct Manager(Shared);

impl Manager {
    async fn queue(&self, call: String, emitter: &SignalEmitter<'_>) -> fdo::Result<OwnedObjectPath> {
        let (result, silent) = {
            let mut said = self.0.lock().unwrap();
            if said.denied {
                return Err(fdo::Error::AccessDenied(
                    "Interactive authentication required.".to_owned(),
                ));
            }
            said.calls.push(call);
            (said.result, said.silent)
        };
        let path = |number: u32| {
            OwnedObjectPath::try_from(format!("/org/freedesktop/systemd1/job/{number}")).unwrap()
        };
        if !silent {
            // As systemd may: other jobs end in between, and ours before its call has returned.
            Self::job_removed(emitter, 8, path(8), "other.service", "failed").await?;
            Self::job_removed(emitter, 9, path(9), "kv.service", result).await?;
        }
        Ok(path(9))
    }
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.systemd1")]
enum ManagerError {
    #[zbus(error)]
    ZBus(zbus::Error),
    AlreadySubscribed(String),
}

#[interface(name = "org.freedesktop.systemd1.Manager")]
impl Manager {
    /// Once for each connection.
    fn subscribe(&self) -> Result<(), ManagerError> {
        if std::mem::replace(&mut self.0.lock().unwrap().subscribed, true) {
            return Err(ManagerError::AlreadySubscribed(
                "Client is already subscribed.".to_owned(),
            ));
        }
        Ok(())
    }

    fn load_unit(&self, name: String) -> OwnedObjectPath {
        self.0.lock().unwrap().loaded = name;
        OwnedObjectPath::try_from("/org/freedesktop/systemd1/unit/kv").unwrap()
    }

    async fn restart_unit(
        &self,
        name: String,
        mode: String,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> fdo::Result<OwnedObjectPath> {
        self.queue(format!("restart {name} {mode}"), &emitter).await
    }

    async fn reload_unit(
        &self,
        name: String,
        mode: String,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> fdo::Result<OwnedObjectPath> {
        self.queue(format!("reload {name} {mode}"), &emitter).await
    }

    fn reset_failed_unit(&self, name: String) {
        self.0.lock().unwrap().calls.push(format!("reset {name}"));
    }

    /// As systemd tells of it.
    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

struct Unit(Shared);

#[interface(name = "org.freedesktop.systemd1.Unit")]
impl Unit {
    #[zbus(property)]
    fn id(&self) -> String {
        self.0.lock().unwrap().id.clone()
    }

    #[zbus(property)]
    fn load_state(&self) -> String {
        self.0.lock().unwrap().load.to_owned()
    }

    #[zbus(property)]
    fn active_state(&self) -> String {
        self.0.lock().unwrap().active.to_owned()
    }
}

fn said() -> Shared {
    Arc::new(Mutex::new(Said {
        result: "done",
        load: "loaded",
        active: "active",
        id: "kv.service".to_owned(),
        ..Said::default()
    }))
}

fn serving<'a>(builder: connection::Builder<'a>, said: &Shared) -> connection::Builder<'a> {
    builder
        .serve_at("/org/freedesktop/systemd1", Manager(Arc::clone(said)))
        .unwrap()
        .serve_at("/org/freedesktop/systemd1/unit/kv", Unit(Arc::clone(said)))
        .unwrap()
}

/// Both ends of one connection without a bus.
async fn peers(said: &Shared) -> (Connection, Connection) {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let guid = zbus::Guid::generate();
    let server = connection::Builder::unix_stream(theirs)
        .server(guid)
        .unwrap()
        .p2p();
    let client = connection::Builder::unix_stream(ours).p2p();
    let (server, client) = tokio::join!(serving(server, said).build(), client.build());
    (server.unwrap(), client.unwrap())
}

fn hands(bus: Bus) -> SystemdHands {
    SystemdHands {
        bus,
        unit: UnitName::try_from("kv.service".to_owned()).unwrap(),
        timeout: Duration::from_mins(1),
    }
}

#[tokio::test]
async fn each_action_is_one_call_and_its_end_is_waited_for() {
    let said = said();
    let (_server, client) = peers(&said).await;
    let hands = hands(Bus::Connected(client));
    for action in [
        ActionKind::RestartUnit,
        ActionKind::ReloadUnit,
        ActionKind::ResetFailedUnit,
    ] {
        let told = hands.act(action).await.unwrap();
        assert!(told.contains("kv.service"), "{told}");
    }
    assert_eq!(said.lock().unwrap().loaded, "kv.service");
    let calls = &said.lock().unwrap().calls;
    assert_eq!(
        *calls,
        [
            "restart kv.service replace",
            "reload kv.service replace",
            "reset kv.service"
        ]
    );
}

#[tokio::test]
async fn every_way_to_fail_is_told_and_is_no_success() {
    let said = said();
    let (_server, client) = peers(&said).await;
    let mut hands = hands(Bus::Connected(client));
    let restart = ActionKind::RestartUnit;
    said.lock().unwrap().load = "not-found";
    assert!(matches!(
        hands.act(restart).await,
        Err(SystemdError::NotLoaded { .. })
    ));
    assert!(
        said.lock().unwrap().calls.is_empty(),
        "a unit that is not there was touched"
    );
    said.lock().unwrap().load = "loaded";
    said.lock().unwrap().result = "dependency";
    let failed = hands.act(restart).await.unwrap_err();
    assert!(
        matches!(&failed, SystemdError::Job { result, .. } if result == "dependency"),
        "{failed}"
    );
    said.lock().unwrap().result = "done";
    said.lock().unwrap().active = "failed";
    assert!(matches!(
        hands.act(restart).await,
        Err(SystemdError::State { .. })
    ));
    let reset = hands.act(ActionKind::ResetFailedUnit).await;
    assert!(matches!(reset, Err(SystemdError::State { .. })));
    said.lock().unwrap().active = "active";
    said.lock().unwrap().denied = true;
    let denied = hands.act(restart).await.unwrap_err().to_string();
    assert!(denied.contains("authentication"), "{denied}");
    said.lock().unwrap().denied = false;
    said.lock().unwrap().silent = true;
    hands.timeout = Duration::from_millis(100);
    assert!(matches!(
        hands.act(restart).await,
        Err(SystemdError::Timeout { .. })
    ));
    let other = hands.act(ActionKind::Freeze).await;
    assert!(matches!(other, Err(SystemdError::NoAction(_))));
}

#[tokio::test]
async fn on_a_real_bus_it_is_found_by_its_name_and_a_bus_that_is_not_there_is_told() {
    let nowhere = hands(Bus::Address("unix:path=/nowhere/bus".to_owned()));
    assert!(matches!(
        nowhere.act(ActionKind::RestartUnit).await,
        Err(SystemdError::Bus(_))
    ));
    let started = Command::new("dbus-daemon")
        .args(["--session", "--nofork", "--print-address=1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut daemon) = started else {
        println!("left out: there is no dbus-daemon here");
        return;
    };
    let mut address = String::new();
    BufReader::new(daemon.stdout.take().unwrap())
        .read_line(&mut address)
        .unwrap();
    let address = address.trim().to_owned();
    let said = said();
    let bus = connection::Builder::address(address.as_str()).unwrap();
    let server = serving(bus, &said)
        .name("org.freedesktop.systemd1")
        .unwrap()
        .build()
        .await;
    let hands = hands(Bus::Address(address));
    let done = hands.act(ActionKind::RestartUnit).await;
    drop(server);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    done.unwrap();
    assert_eq!(said.lock().unwrap().calls, ["restart kv.service replace"]);
}
