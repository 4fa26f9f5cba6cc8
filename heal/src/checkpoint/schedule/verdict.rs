//! What the schedule is asked under and what it answers.

use std::fmt;
use std::time::Duration;

/// What is known of the disk at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Room {
    /// Bytes free where checkpoints are kept.
    pub free_bytes: u64,
    /// Bytes that the next copy will take, as far as known.
    pub needed_bytes: u64,
    /// Bytes that have to stay free.
    pub reserve_bytes: u64,
    /// Share of time in which every task waits for the disk (`full avg10` of `/proc/pressure/io`), 0 to 1; `None` when not known.
    pub io_full: Option<f64>,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Nothing is due before `until` unless the risk changes.
    Wait {
        /// On the caller's monotonic clock.
        until: Duration,
    },
    /// Take one.
    Take(Why),
    /// One is due and must not be taken.
    Skip(Refusal),
}

/// Why a checkpoint is due.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Why {
    /// There is none yet, or the latest is damaged.
    First,
    /// Expected loss has reached the cost of a checkpoint.
    Due,
    /// The longest gap has passed.
    LongestGap,
    /// A failure is near.
    Risk {
        /// The chance of it after calibration, 0 to 1.
        probability: f64,
        /// Of what.
        resource: Option<&'static str>,
    },
}

/// Why one that is due is not taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Refusal {
    /// The copy would fill the disk.
    DiskNearlyFull {
        /// Bytes free.
        free_bytes: u64,
        /// Bytes that have to be.
        wanted_bytes: u64,
    },
    /// A full disk is what is foretold, and the copy would bring it nearer.
    WouldFillTheDisk,
    /// The disk is the bottleneck already.
    Saturated {
        /// Share of time, 0 to 1.
        io_full: f64,
    },
    /// The last attempts failed.
    BackingOff {
        /// On the caller's monotonic clock.
        until: Duration,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("there is none yet, or the latest is damaged"),
            Self::Due => f.write_str("the expected loss has reached what one costs"),
            Self::LongestGap => f.write_str("the longest gap has passed"),
            Self::Risk {
                probability,
                resource,
            } => {
                // What is at stake may be worth a copy at a small chance: it is not to be read as none.
                let chance = match 100.0 * probability {
                    percent if percent < 0.1 => "below 0.1 %".to_owned(),
                    percent if percent < 1.0 => format!("{percent:.1} %"),
                    percent => format!("{percent:.0} %"),
                };
                let resource = resource.unwrap_or("the service");
                write!(f, "a failure of {resource} is near (chance {chance})")
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DiskNearlyFull {
                free_bytes,
                wanted_bytes,
            } => write!(
                f,
                "the disk is nearly full: {free_bytes} bytes are free and {wanted_bytes} have to be; make room"
            ),
            Self::WouldFillTheDisk => {
                f.write_str("a full disk is foretold and the copy would bring it nearer; make room")
            }
            Self::Saturated { io_full } => write!(
                f,
                "the disk is saturated ({:.0} % of the time everything waits for it)",
                100.0 * io_full
            ),
            Self::BackingOff { .. } => f.write_str("the last attempt failed, the next one waits"),
        }
    }
}
