//! The course of one resource as a few numbers without a unit, the same for bytes, descriptors and connections.

use super::Abstain;
use super::exhaustion::Course;

/// Windows that are looked at, in seconds.
const WINDOWS_S: [f64; 3] = [60.0, 300.0, 900.0];
/// Growth is told as what it would come to in this time, in seconds.
const AHEAD_S: f64 = 900.0;

/// Names of the features, in the order of [`features`].
pub fn names() -> Vec<String> {
    let mut names = vec!["headroom".to_owned(), "history".to_owned()];
    for window in ["1m", "5m", "15m"] {
        for what in ["growth", "reached", "rising", "steady_growth", "noise"] {
            names.push(format!("{what}_{window}"));
        }
    }
    names
}

/// The features of a resource now: headroom, how much of the longest window is known, and for each window the growth towards the limit, how steadily it rises
/// (Kendall's τ) and its noise, all relative to the headroom.
///
/// # Errors
/// [`Abstain::TooShort`] until the shortest window has points enough.
pub fn features(course: &Course<'_>) -> Result<Vec<f64>, Abstain> {
    let headroom = course.headroom().max(1e-6);
    let longest = WINDOWS_S[WINDOWS_S.len() - 1];
    let mut row = vec![headroom.ln(), (course.history_s() / longest).min(1.0)];
    for window in WINDOWS_S {
        let line = course.line(window).ok_or(Abstain::TooShort)?;
        // 0 flat, 1 at the limit after AHEAD_S.
        let way = AHEAD_S * line.slope.max(0.0) / headroom;
        // ln, so that a steep line does not outweigh all others.
        let growth = way.ln_1p();
        row.extend([
            growth,
            way / (1.0 + way),
            line.rising,
            growth * line.rising,
            (line.noise / headroom).ln_1p(),
        ]);
    }
    Ok(row)
}
