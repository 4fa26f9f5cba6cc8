//! Starting a shadow where it cannot reach the primary.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::thread::UnshareFlags;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use crate::folder::Folder;
use crate::postgres::owner::Owner;
use crate::postgres::{PostgresError, at};

/// How a shadow is kept from the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Isolation {
    /// Whether nothing outside can be reached from it.
    pub(super) apart: bool,
    /// How, in words.
    pub(super) words: String,
}

impl Isolation {
    fn none(why: &str) -> Self {
        Self {
            apart: false,
            words: format!("own socket only, no address listened on ({why})"),
        }
    }
}

/// Starts the command where it has no network and where the primary's socket is hidden, if we are root and may; else as it is.
pub(super) async fn spawn_apart(
    command: Command,
    primary: Option<PathBuf>,
) -> (std::io::Result<Child>, Isolation) {
    if !rustix::process::geteuid().is_root() {
        let mut command = command;
        return (command.spawn(), Isolation::none("namespaces need root"));
    }
    let runtime = tokio::runtime::Handle::current();
    let (send, receive) = oneshot::channel();
    // A thread of its own: a namespace belongs to the thread that entered it, and to what that starts.
    let thread = std::thread::Builder::new()
        .name("shadow-start".to_owned())
        .spawn(move || {
            let _entered = runtime.enter();
            let mut command = command;
            let isolation = match apart(primary.as_deref()) {
                Ok(hidden) => Isolation {
                    apart: true,
                    words: format!("own network and mount namespace, {hidden}"),
                },
                Err(error) => Isolation::none(&format!("namespaces refused: {error}")),
            };
            if send.send((command.spawn(), isolation)).is_err() {
                tracing::debug!("nobody waits for the shadow any more");
            }
        });
    match thread {
        Ok(_detached) => receive.await.unwrap_or_else(|_gone| {
            (
                Err(std::io::Error::other("the starting thread ended")),
                Isolation::none("not started"),
            )
        }),
        Err(error) => (Err(error), Isolation::none("not started")),
    }
}

/// Moves this thread into namespaces of its own. What became of the primary's socket, in words.
fn apart(primary: Option<&Path>) -> std::io::Result<&'static str> {
    #[expect(
        deprecated,
        reason = "unsafe only with UnshareFlags::FILES, which is not asked for; the workspace forbids unsafe code"
    )]
    rustix::thread::unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // A socket file is reached through the file system whatever the network namespace, so it is covered.
    if let Some(primary) = primary.filter(|primary| primary.exists()) {
        mount_bind("/dev/null", primary)?;
        return Ok("the primary's socket covered");
    }
    Ok("no primary's socket to cover")
}

/// The folder of the shadow's socket, in the work directory where its name is short enough.
#[derive(Debug)]
pub(super) struct SocketDir(PathBuf);

impl SocketDir {
    /// Belongs to `owner`, who alone may enter. `max` is the longest name in bytes that leaves room for the socket's own.
    pub(super) fn make(work: &Folder, owner: Owner, max: usize) -> Result<Self, PostgresError> {
        let inside = work.path_of("s");
        let (dir, made) = if inside.as_os_str().len() <= max {
            let made = work.make("s");
            (inside, made)
        } else {
            let unique = format!(
                "theriac-{}-{}",
                std::process::id(),
                crate::executor::clock::now().unix_ms
            );
            let dir = std::env::temp_dir().join(unique);
            let made = DirBuilder::new().mode(0o700).create(&dir);
            let made = made.and_then(|()| Folder::open(&dir));
            (dir, made)
        };
        let made = made.map_err(at(&dir))?;
        owner.take_open(&made)?;
        Ok(Self(dir))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!(%error, "socket folder not removed");
        }
    }
}
