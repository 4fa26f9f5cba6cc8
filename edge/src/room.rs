//! The file system of a service's state: whether it is full, what could be moved away then, and whether it can be written at all.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use theriac_heal::executor::space::{room_asked, room_needed};
use theriac_heal::incident::Input;

use crate::config::{ServiceConfig, StateSettings};
use crate::service::{ServiceContext, space_hands};

/// What is known of it from one look to the next.
#[derive(Debug, Default)]
pub(crate) struct Room {
    full: bool,
    /// Whether it was ever seen writable: one that never was is meant so.
    was_writable: bool,
    /// When it was last seen how much could be moved away, and how much that was.
    walked: Option<(Instant, u64)>,
}

impl Room {
    /// How much could be moved away takes its time to see where there are many files: it is waited for for a moment when the disk turns full, and
    /// afterwards only by who has the time (`thorough`).
    async fn look_whether_full(&mut self, context: &ServiceContext, thorough: bool) {
        let Some(state) = &context.shared.config.state else {
            return;
        };
        let Some(found) = context.file_system(state).await else {
            return;
        };
        let size = found.f_blocks.saturating_mul(found.f_frsize);
        let free_bytes = found.f_bavail.saturating_mul(found.f_frsize);
        let (below, needed) = (
            full_below(state, size, found.f_frsize),
            room_needed(size).max(room_asked(state.free_bytes_min.unwrap_or(0), size)),
        );
        let service = context.shared.name.clone();
        if self.full && free_bytes >= 2 * needed {
            (self.full, self.walked) = (false, None);
            context.tell(Input::DiskRelieved { service }).await;
        } else if self.full {
            if thorough {
                self.walk(context).await;
            }
        } else if free_bytes < below {
            self.turned_full(context, free_bytes, WALK_SOON).await;
        }
    }

    async fn turned_full(&mut self, context: &ServiceContext, free_bytes: u64, patience: Duration) {
        let service = context.shared.name.clone();
        if tokio::time::timeout(patience, self.walk(context)).await.is_err() {
            tracing::debug!(service, "what may be moved away is told later");
        }
        context.tell(Input::DiskFull { service, free_bytes }).await;
        self.full = true;
    }

    /// Tells how much could be moved away: at once, and while it stays full now and then, since files become old enough for it.
    async fn walk(&mut self, context: &ServiceContext) {
        if self.walked.is_some_and(|(at, _)| at.elapsed() < WALK_EVERY) {
            return;
        }
        let service = context.shared.name.clone();
        let bytes = match space_hands(context) {
            Some(hands) => tokio::task::spawn_blocking(move || hands.relievable())
                .await
                .map_err(std::io::Error::other)
                .flatten()
                .unwrap_or_else(|error| {
                    tracing::warn!(service, %error, "no room can be made");
                    0
                }),
            None => 0,
        };
        if self.walked.is_none_or(|(_, before)| before != bytes) {
            context.tell(Input::Relievable { service, bytes }).await;
        }
        self.walked = Some((Instant::now(), bytes));
    }

    /// Tells when it could be written and is mounted read-only now, as after an error of the disk; and when it can be written again.
    async fn look_whether_writable(&mut self, context: &ServiceContext) {
        let on = match &context.shared.config.state {
            Some(state) => match context.file_system(state).await {
                Some(found) => found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
                None => return,
            },
            None => false,
        };
        // Also at the first look: an incident from before the edge's restart waits for it.
        if self.was_writable || !on {
            let service = context.shared.name.clone();
            context.tell(Input::ReadOnly { service, on }).await;
        }
        self.was_writable |= !on;
    }
}

impl ServiceContext {
    /// Looks at the file system of its state now and then, and tells what has changed.
    pub(crate) async fn watch_room(&self) {
        self.look(true).await;
    }

    async fn look(&self, thorough: bool) {
        let mut room = self.shared.room.lock().await;
        room.look_whether_full(self, thorough).await;
        room.look_whether_writable(self).await;
    }

    /// The same before anything is told that could come of it, which waits for a second at most.
    pub(crate) async fn look_at_room(&self) {
        if tokio::time::timeout(LOOK_MAX, self.look(false)).await.is_err() {
            tracing::warn!(
                service = self.shared.name,
                "the file system of its state does not answer in time"
            );
        }
    }

    /// `None` where that cannot be told, or has not come back from the last time: one of another host that is gone holds whoever asks.
    async fn file_system(&self, state: &StateSettings) -> Option<rustix::fs::StatVfs> {
        let asked = Arc::clone(&self.shared);
        if asked.asks_file_system.swap(true, Ordering::AcqRel) {
            return None;
        }
        let dir = state.dir.clone();
        let found = tokio::task::spawn_blocking(move || {
            let found = rustix::fs::statvfs(&dir);
            asked.asks_file_system.store(false, Ordering::Release);
            found.ok()
        });
        found.await.ok().flatten()
    }
}

/// Whether it was found to have room just now.
pub(crate) fn is_ample(context: &ServiceContext) -> bool {
    let state = context.shared.config.state.as_ref();
    let Some(Ok(found)) = state.map(|state| rustix::fs::statvfs(&state.dir)) else {
        return false;
    };
    let size = found.f_blocks.saturating_mul(found.f_frsize);
    found.f_bavail.saturating_mul(found.f_frsize) >= 2 * room_needed(size)
}

/// Bytes that must be free for a file system of `size` bytes not to count as full. However few are asked for, one on which not a block is left
/// is full.
fn full_below(state: &StateSettings, size: u64, block: u64) -> u64 {
    state
        .free_bytes_min
        .map_or_else(|| room_needed(size), |least| room_asked(least, size).max(block))
}

/// In words, where more room is asked for than the file system can be expected to have.
pub(crate) fn asks_too_much(service: &ServiceConfig) -> Option<String> {
    let state = service.state.as_ref()?;
    let found = rustix::fs::statvfs(&state.dir).ok()?;
    let asked = state.free_bytes_min?;
    let counts = room_asked(asked, found.f_blocks.saturating_mul(found.f_frsize));
    (counts < asked).then(|| {
        format!(
            "{}: state.free_bytes_min asks for {asked} bytes, more than an eighth of the file system of {}: {counts} count",
            service.name,
            state.dir.display()
        )
    })
}

/// Time between two looks at what could be moved away while it stays full.
const WALK_EVERY: Duration = Duration::from_mins(1);
/// Time for which a full disk is not told before it is known what could be moved away.
const WALK_SOON: Duration = Duration::from_millis(500);
/// Longest time of a look.
const LOOK_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;

    use super::*;

    fn state_in(root: &Path) -> String {
        let dir = root.join("data");
        fs::create_dir(&dir).unwrap();
        format!("[service.state]\ndir = '{}'\n", dir.display())
    }

    #[tokio::test]
    async fn the_first_look_tells_that_the_state_can_be_written_so_that_what_an_earlier_run_saw_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (context, mut received) = ServiceContext::for_test(dir.path(), &state_in(dir.path()));
        let mut room = Room::default();
        room.look_whether_writable(&context).await;
        assert!(room.was_writable);
        assert!(matches!(
            received.try_recv(),
            Ok(Input::ReadOnly { on: false, .. })
        ));
    }

    const MIN_AGE: Duration = Duration::from_mins(10);

    /// With a young file that may be moved away when it is older than [`MIN_AGE`].
    fn with_a_cache(root: &Path) -> (String, File) {
        let cache = root.join("cache");
        fs::create_dir(&cache).unwrap();
        fs::write(cache.join("old"), vec![7; 10_000]).unwrap();
        let space = format!(
            "{}[service.space]\nrelieve = ['{}']\nquarantine = '{}'\nmin_age = '10m'\n",
            state_in(root),
            cache.display(),
            root.join("aside").display()
        );
        let file = File::options().write(true).open(cache.join("old")).unwrap();
        (space, file)
    }

    fn grow_old(file: &File) {
        file.set_modified(std::time::SystemTime::now() - 2 * MIN_AGE)
            .unwrap();
    }

    #[test]
    fn a_full_disk_is_told_where_what_may_be_moved_away_takes_long_to_see_and_that_later() {
        let dir = tempfile::tempdir().unwrap();
        let (space, file) = with_a_cache(dir.path());
        grow_old(&file);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (context, mut received) = ServiceContext::for_test(dir.path(), &space);
            // Files are looked through on the one thread that is held up here.
            let (release, held) = std::sync::mpsc::channel::<()>();
            drop(tokio::task::spawn_blocking(move || held.recv()));
            let mut room = Room::default();
            room.turned_full(&context, 7, Duration::ZERO).await;
            assert!(matches!(
                received.try_recv(),
                Ok(Input::DiskFull { free_bytes: 7, .. })
            ));
            assert!(room.full && room.walked.is_none());
            drop(release);
            room.walk(&context).await;
            assert!(matches!(received.try_recv(), Ok(Input::Relievable { bytes, .. }) if bytes >= 10_000));
        });
    }

    #[tokio::test]
    async fn what_becomes_old_enough_while_the_disk_stays_full_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (space, file) = with_a_cache(dir.path());
        let (context, mut received) = ServiceContext::for_test(dir.path(), &space);
        let mut room = Room {
            full: true,
            ..Room::default()
        };
        room.walk(&context).await;
        assert!(matches!(
            received.try_recv(),
            Ok(Input::Relievable { bytes: 0, .. })
        ));
        grow_old(&file);
        room.walk(&context).await;
        assert!(received.try_recv().is_err(), "not looked at again so soon");
        let before = Instant::now().checked_sub(2 * WALK_EVERY);
        room.walked = before.map(|before| (before, 0));
        room.walk(&context).await;
        assert!(matches!(received.try_recv(), Ok(Input::Relievable { bytes, .. }) if bytes >= 10_000));
    }
}
