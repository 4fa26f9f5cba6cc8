//! The network between one edge and the aggregator, message by message.
//!
//! In bad weather it is meaner than the real transport, which keeps a session's messages whole and in order: a message may be
//! lost without the session ending, come twice, or overtake others. What is safe here is safe there.

use std::time::Duration;

use rand::Rng;

/// How bad the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// As on the real transport: nothing is lost, doubled or overtaken; 2 ms.
    Calm,
    /// A few messages in a hundred lost or doubled; 1 to 60 ms, so that messages overtake each other.
    Lossy,
    /// One message in four lost, one in ten doubled; 1 ms to 3 s.
    Storm,
}

impl Weather {
    /// Chance in a hundred that a message is lost.
    fn loss(self) -> u32 {
        match self {
            Self::Calm => 0,
            Self::Lossy => 4,
            Self::Storm => 25,
        }
    }

    /// Chance in a hundred that a message that is not lost comes twice.
    fn doubling(self) -> u32 {
        match self {
            Self::Calm => 0,
            Self::Lossy => 4,
            Self::Storm => 10,
        }
    }

    fn latency_ms(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Self::Calm => 2..=2,
            Self::Lossy => 1..=60,
            Self::Storm => 1..=3000,
        }
    }

    /// How long each copy of a message takes; empty: it is lost.
    pub fn copies(self, rng: &mut impl Rng) -> Vec<Duration> {
        if rng.random_ratio(self.loss(), 100) {
            return Vec::new();
        }
        let copies = 1 + usize::from(rng.random_ratio(self.doubling(), 100));
        (0..copies)
            .map(|_| Duration::from_millis(rng.random_range(self.latency_ms())))
            .collect()
    }

    /// Whether the loss of a message ends the session, as it would on a real transport.
    pub fn breaks(self, rng: &mut impl Rng) -> bool {
        rng.random_ratio(1, 2)
    }
}
