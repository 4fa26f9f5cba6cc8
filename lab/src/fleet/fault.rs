//! Real faults, injected from outside into the process of a running service.

use rustix::process::{Pid, Signal, kill_process};

use super::http::{Client, HttpError};
use super::place::Site;

/// A fault that the lab can inject without special rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The process is killed.
    Kill9,
    /// The process is stopped: it lives, but answers nobody.
    Hang,
    /// The process keeps more and more memory.
    MemoryLeak,
    /// The process burns processor time in four threads.
    CpuHog,
}

/// Why a fault could not be injected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The process is not the service that was meant; a pid may have been used again.
    #[error("process {pid} is no service of {site}; nothing was done to it")]
    NotOurs {
        /// The process.
        pid: u32,
        /// The site.
        site: String,
    },
    /// The signal was refused.
    #[error("cannot send a signal to process {pid}: {source}")]
    Signal {
        /// The process.
        pid: u32,
        /// What the system said.
        source: rustix::io::Errno,
    },
    /// The service's control port does not take the fault.
    #[error("the service does not take the fault: {0}")]
    Control(#[from] HttpError),
}

impl Fault {
    /// Every fault, from the plainest to the most gradual.
    pub const ALL: [Self; 4] = [Self::Kill9, Self::Hang, Self::MemoryLeak, Self::CpuHog];

    /// Its name on the command line and in summaries.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill9 => "kill9",
            Self::Hang => "hang",
            Self::MemoryLeak => "memory_leak",
            Self::CpuHog => "cpu_hog",
        }
    }

    /// What is done, for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Kill9 => "kill −9",
            Self::Hang => "hang (SIGSTOP)",
            Self::MemoryLeak => "memory leak",
            Self::CpuHog => "CPU hog",
        }
    }

    /// Injects it into process `pid`, the service of `site`.
    ///
    /// # Errors
    /// [`FaultError`]; nothing was done then.
    pub async fn inject(self, site: &Site, pid: u32, client: &Client) -> Result<(), FaultError> {
        match self {
            Self::Kill9 => signal(site, pid, Signal::KILL),
            Self::Hang => signal(site, pid, Signal::STOP),
            Self::MemoryLeak => Ok(client.post(site.control, "/fault/leak?mib_per_s=24").await?),
            Self::CpuHog => Ok(client.post(site.control, "/fault/cpu?threads=4").await?),
        }
    }

    /// Takes it back where nobody has healed it.
    pub async fn undo(self, site: &Site, pid: u32, client: &Client) {
        let undone = match self {
            Self::Kill9 => return,
            Self::Hang => signal(site, pid, Signal::CONT),
            Self::MemoryLeak | Self::CpuHog => client
                .post(site.control, "/fault/none")
                .await
                .map_err(FaultError::from),
        };
        if let Err(error) = undone {
            tracing::info!(%error, fault = self.name(), "nothing to take back");
        }
    }
}

/// Sends a signal after a look at whom it would hit: the process must have the site's state directory among its words.
fn signal(site: &Site, pid: u32, signal: Signal) -> Result<(), FaultError> {
    let not_ours = || FaultError::NotOurs {
        pid,
        site: site.name.clone(),
    };
    let raw = i32::try_from(pid).map_err(|_| not_ours())?;
    let state = site.service_state();
    let words = procfs::process::Process::new(raw).and_then(|process| process.cmdline());
    let is_ours = words.is_ok_and(|words| words.iter().any(|word| std::path::Path::new(word) == state));
    let target = Pid::from_raw(raw).filter(|_| is_ours).ok_or_else(not_ours)?;
    kill_process(target, signal).map_err(|source| FaultError::Signal { pid, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::time::Duration;

    #[tokio::test]
    async fn never_hits_a_process_that_is_not_the_service() {
        let address = super::super::free_addresses(1).unwrap()[0];
        let site = Site::new(Path::new("/nowhere"), "amber", [address; 3]);
        let client = Client::new(Duration::from_millis(200));
        let own = std::process::id();
        let refused = Fault::Kill9.inject(&site, own, &client).await.unwrap_err();
        assert!(matches!(refused, FaultError::NotOurs { .. }), "{refused}");
        let absent = Fault::MemoryLeak.inject(&site, own, &client).await.unwrap_err();
        assert!(matches!(absent, FaultError::Control(_)), "{absent}");
    }
}
