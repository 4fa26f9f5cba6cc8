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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::risk::Horizon;
    use crate::risk::exhaustion::Track;

    fn after(seconds: u32, share: impl Fn(f64) -> f64) -> Result<Vec<f64>, Abstain> {
        let mut track = Track::new(&Horizon::DEFAULT).unwrap();
        for second in 0..seconds {
            let at_s = f64::from(second);
            track.push(at_s, share(at_s));
        }
        features(&track.course().unwrap())
    }

    #[test]
    fn every_feature_has_a_name_and_is_finite_even_past_the_limit() {
        for row in [after(1000, |_| 0.5), after(1000, |at_s| at_s / 500.0)] {
            let row = row.unwrap();
            assert_eq!(row.len(), names().len());
            assert!(row.iter().all(|value| value.is_finite()));
        }
        assert_eq!(after(10, |_| 0.5), Err(Abstain::TooShort));
    }

    #[test]
    fn a_steeper_course_has_more_growth() {
        let steep = after(900, |at_s| 0.1 + at_s / 1100.0).unwrap();
        let flat = after(900, |at_s| 0.1 + at_s / 9000.0).unwrap();
        let growth = names().iter().position(|name| name == "growth_15m").unwrap();
        assert!(steep[growth] > flat[growth]);
    }
}
