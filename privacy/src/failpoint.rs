//! The durable steps of the ledger, as points where a test can stop the process for good.
//!
//! Only with the feature `failpoints`, which no shipped binary enables. Without a hook nothing happens.

use std::sync::OnceLock;

/// Called at each step, with its name.
pub type Hook = fn(&'static str);

static HOOK: OnceLock<Hook> = OnceLock::new();

/// Calls `hook` at every durable step from now on. The first hook stays.
pub fn install(hook: Hook) {
    HOOK.get_or_init(|| hook);
}

pub(crate) fn is_installed() -> bool {
    HOOK.get().is_some()
}

pub(crate) fn reached(step: &'static str) {
    if let Some(hook) = HOOK.get() {
        hook(step);
    }
}
