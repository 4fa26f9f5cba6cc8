//! Bytes and frames that went over a session or an endpoint.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A reading of the counters. Bytes are those of frames, header and payload; QUIC's own overhead is not in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes handed to QUIC.
    pub bytes_sent: u64,
    /// Bytes taken from QUIC.
    pub bytes_received: u64,
    /// Frames handed over whole.
    pub frames_sent: u64,
    /// Frames received whole.
    pub frames_received: u64,
}

/// Counters of one session, each step also counted for its endpoint.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    frames_sent: AtomicU64,
    frames_received: AtomicU64,
    parent: Option<Arc<Counters>>,
}

impl Counters {
    pub(crate) fn of_session(parent: Arc<Self>) -> Arc<Self> {
        Arc::new(Self {
            parent: Some(parent),
            ..Self::default()
        })
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.add(|counters| &counters.bytes_sent, bytes as u64);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.add(|counters| &counters.bytes_received, bytes as u64);
    }

    pub(crate) fn frame_sent(&self) {
        self.add(|counters| &counters.frames_sent, 1);
    }

    pub(crate) fn frame_received(&self) {
        self.add(|counters| &counters.frames_received, 1);
    }

    pub(crate) fn read(&self) -> Traffic {
        // Relaxed: a reading for people, nothing is ordered by it.
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            bytes_sent: load(&self.bytes_sent),
            bytes_received: load(&self.bytes_received),
            frames_sent: load(&self.frames_sent),
            frames_received: load(&self.frames_received),
        }
    }

    fn add(&self, field: impl Fn(&Self) -> &AtomicU64, count: u64) {
        field(self).fetch_add(count, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            field(parent).fetch_add(count, Ordering::Relaxed);
        }
    }
}
