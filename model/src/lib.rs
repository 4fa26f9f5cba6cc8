//! Numbers on one machine: from raw metric samples to an anomaly score, and from history to what a federation may learn.
//!
//! ```text
//! detect   Sample → Normaliser → lag ring → two forecasters → residuals → score head → AlarmState
//! learn    Series → moments of complete blocks (public scaler) → [privacy, network, rule] → solve → GlobalModel → gate
//!          Series → gradients of complete blocks → [privacy, network, rule] → step → GlobalModel → gate, round after round
//! ```
//!
//! The crate knows tensors, not networks: it opens no socket, reads no clock and names no peer. It also knows no
//! privacy mechanism; whatever [`moments`] or [`train`] return is **raw** and must pass through the types of
//! `theriac-privacy` before it leaves the host. [`sample::Sample`], [`series::Series`] and
//! [`normalise::Normaliser`] have no `Serialize` and print no value for the same reason.
//!
//! Start at [`detector::Detector`] (fit, score, save, load), [`detector::Scorer`] (one row at a time) and
//! [`global::GlobalModel`] (what crosses sites). The score is the one of two forecasters, each channel from its
//! own lags and each channel from all lags, with a head of two half-lives. [`causes`] and [`call_graph`] say what an
//! alarm is about; [`arm::Arm`] names the detector and what it is compared with.
//!
//! Arithmetic: inputs, weights and forecasts are `f32`; Gram matrices, solves, quantiles and the smoothing of
//! the score are `f64`.

pub mod appraisal;
pub mod arm;
pub mod call_graph;
pub mod causes;
pub mod detector;
pub mod feature;
pub mod forecaster;
pub mod gate;
pub mod global;
pub mod gradient;
pub mod io;
pub mod linear;
mod model_file;
pub mod moments;
pub mod normalise;
pub mod params;
pub mod personalise;
pub mod private_train;
pub mod ridge;
pub mod risk;
pub mod sample;
pub mod score;
pub mod series;
pub mod threshold;
pub mod train;
pub mod window;

/// Lags, in rows, that every forecaster looks back.
pub const LAGS: [usize; 5] = [1, 2, 3, 5, 10];

/// The longest lag: rows that must have been seen before the first forecast.
pub const LAG_MAX: usize = 10;

/// Number of lags.
pub const LAG_COUNT: usize = LAGS.len();
