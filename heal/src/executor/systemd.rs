//! A unit of systemd, over D-Bus: restart, reload, reset of its failed state. With the feature `systemd`.
//!
//! | | `restart_unit` | `reload_unit` | `reset_failed_unit` |
//! |---|---|---|---|
//! | precondition | the unit is named in the configuration, loaded, and not the one that runs us; the policy allows it (R2); the bus lets us (polkit, `org.freedesktop.systemd1.manage-units`) | the same, and it can reload | the same as restart |
//! | effect | one job `RestartUnit(UNIT, "replace")`, waited for | one job `ReloadUnit` | `ResetFailedUnit`: its start limit begins anew |
//! | undo | none: the process before is gone | none | none needed |
//! | verified by | the service, as after any other action; here only that the job was `done` and the unit is `active` | the same | that it is no longer `failed` |
//!
//! After a crash of ours between intent and effect nothing is asked again: the intent counts as tried, and the service tells.
//! Source: `org.freedesktop.systemd1(5)`.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::timeout;
use zbus::export::futures_core::Stream as _;
use zbus::proxy::{Builder, CacheProperties};
use zbus::zvariant::OwnedObjectPath;
use zbus::{Connection, Proxy};

use super::unit::UnitName;
use crate::types::ActionKind;

/// Where systemd is asked.
#[derive(Debug, Clone)]
pub enum Bus {
    /// The system's bus.
    System,
    /// A bus at a D-Bus address, such as `unix:path=/run/dbus/system_bus_socket`.
    Address(String),
    /// A connection that somebody else made.
    Connected(Connection),
}

/// The hands on one unit.
#[derive(Debug, Clone)]
pub struct SystemdHands {
    /// Where.
    pub bus: Bus,
    /// The unit.
    pub unit: UnitName,
    /// Longest time for everything together.
    pub timeout: Duration,
}

/// Why a unit was not changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SystemdError {
    /// The bus, or systemd on it, does not answer or refuses.
    #[error("systemd: {0}")]
    Bus(#[from] zbus::Error),
    /// The unit is not there.
    #[error("{unit} is {state}, not loaded")]
    NotLoaded {
        /// The unit.
        unit: UnitName,
        /// Its load state.
        state: String,
    },
    /// It is the unit that runs us.
    #[error("{0} is the unit of the healer itself")]
    Own(UnitName),
    /// The job ended otherwise than well.
    #[error("the job on {unit} ended: {result}")]
    Job {
        /// The unit.
        unit: UnitName,
        /// systemd's word: `failed`, `timeout`, `canceled`, `dependency`, `skipped`.
        result: String,
    },
    /// The job was done and the unit is not as it should be.
    #[error("{unit} is {state} after the job was done")]
    State {
        /// The unit.
        unit: UnitName,
        /// Its active state.
        state: String,
    },
    /// It took too long. The job may go on.
    #[error("{unit}: no end within {after:?}; the job may go on")]
    Timeout {
        /// The unit.
        unit: UnitName,
        /// The time.
        after: Duration,
    },
    /// Another action.
    #[error("{0} is no action on a unit")]
    NoAction(ActionKind),
}

impl SystemdHands {
    /// Carries an action out. What was seen, in words.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub async fn act(&self, action: ActionKind) -> Result<String, SystemdError> {
        timeout(self.timeout, self.try_to(action))
            .await
            .map_err(|_| SystemdError::Timeout {
                unit: self.unit.clone(),
                after: self.timeout,
            })?
    }

    async fn try_to(&self, action: ActionKind) -> Result<String, SystemdError> {
        let bus = match &self.bus {
            Bus::System => Connection::system().await?,
            Bus::Address(address) => {
                zbus::connection::Builder::address(address.as_str())?
                    .build()
                    .await?
            }
            Bus::Connected(connection) => connection.clone(),
        };
        let manager = proxy(&bus, ROOT.try_into().map_err(zbus::Error::from)?, MANAGER).await?;
        let name = self.unit.as_str();
        let path: OwnedObjectPath = manager.call("LoadUnit", &(name,)).await?;
        let unit = proxy(&bus, path, UNIT).await?;
        let state: String = unit.get_property("LoadState").await?;
        if state != "loaded" {
            let unit = self.unit.clone();
            return Err(SystemdError::NotLoaded { unit, state });
        }
        // Under an alias too.
        let id: String = unit.get_property("Id").await?;
        let id = UnitName::try_from(id).unwrap_or_else(|_| self.unit.clone());
        let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if self.unit.has(&cgroups) || id.has(&cgroups) {
            return Err(SystemdError::Own(id));
        }
        match action {
            ActionKind::RestartUnit => self.job(&manager, "RestartUnit").await?,
            ActionKind::ReloadUnit => self.job(&manager, "ReloadUnit").await?,
            ActionKind::ResetFailedUnit => {
                manager.call::<_, _, ()>("ResetFailedUnit", &(name,)).await?;
            }
            other => return Err(SystemdError::NoAction(other)),
        }
        let state: String = unit.get_property("ActiveState").await?;
        let good = match action {
            ActionKind::ResetFailedUnit => state != "failed",
            _ => state == "active",
        };
        if good {
            Ok(format!("{action} of {name} is done; it is {state}"))
        } else {
            let unit = self.unit.clone();
            Err(SystemdError::State { unit, state })
        }
    }

    /// Queues a job and waits for its end. Listening begins before, so that a quick one is not missed.
    async fn job(&self, manager: &Proxy<'_>, method: &str) -> Result<(), SystemdError> {
        match manager.call::<_, _, ()>("Subscribe", &()).await {
            // By an action before, on the same connection.
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == SUBSCRIBED => {}
            done => done?,
        }
        let mut removed = manager.receive_signal("JobRemoved").await?;
        let job: OwnedObjectPath = manager.call(method, &(self.unit.as_str(), "replace")).await?;
        loop {
            let next = std::future::poll_fn(|context| Pin::new(&mut removed).poll_next(context)).await;
            let Some(message) = next else {
                return Err(zbus::Error::InterfaceNotFound.into());
            };
            let body = message.body();
            let (_, path, _, result): (u32, OwnedObjectPath, String, String) = body.deserialize()?;
            if path != job {
                continue;
            }
            return if result == "done" {
                Ok(())
            } else {
                let unit = self.unit.clone();
                Err(SystemdError::Job { unit, result })
            };
        }
    }
}

async fn proxy<'a>(
    bus: &Connection,
    path: OwnedObjectPath,
    interface: &'a str,
) -> Result<Proxy<'a>, zbus::Error> {
    Builder::new(bus)
        .destination(DESTINATION)?
        .path(path)?
        .interface(interface)?
        // What it is now is asked, not what it was.
        .cache_properties(CacheProperties::No)
        .build()
        .await
}

const DESTINATION: &str = "org.freedesktop.systemd1";
const ROOT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const SUBSCRIBED: &str = "org.freedesktop.systemd1.AlreadySubscribed";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
