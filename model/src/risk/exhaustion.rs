//! The linear fallback: when does a resource reach its limit if it goes on like this, and how far off was that so far?
//!
//! The line is Theil–Sen's (median of all pairwise slopes; Sen, 1968), which a spike or a step does not bend. Its error is not
//! assumed but measured: every so often the line's forecast for each horizon is put aside, and when the time has come, the highest value
//! in between is held against it. The chance of reaching the limit is the share of those past errors that would carry
//! today's forecast over it; their correlation is counted (errors of overlapping forecasts are nearly one), and the bounds are
//! Wilson's. No failure is needed to learn this, only time: until there are errors enough, a quarter of the growth is taken for the error.

use std::collections::VecDeque;

use super::{Abstain, Chance, Horizon, LeadTime, RiskError};

/// Points of the longest window, at least; more where the shortest horizon asks for them.
const POINTS: f64 = 180.0;
/// Points within the shortest horizon, at least, so that a line can be drawn through it.
const POINTS_SHORTEST: f64 = 12.0;
/// Points kept at most, in 70 kB.
const POINTS_MAX: f64 = 4_320.0;
/// How many times as long as the shortest horizon the longest may be: the points of both come from one track.
pub const HORIZON_RATIO_MAX: u32 = 360;
/// Most points of one line: their pairs are all looked at.
const LINE_POINTS_MAX: usize = 60;
/// Fewest points of a line.
const LINE_POINTS_MIN: usize = 6;
/// Errors kept for each horizon.
const ERRORS_MAX: usize = 120;
/// Errors needed before they are trusted.
const ERRORS_MIN: usize = 12;
/// Forecasts put aside in the time of one horizon.
const FORECASTS_PER_HORIZON: f64 = 12.0;
/// Part of the forecast growth that counts as its standard deviation before there are errors.
const DOUBT: f64 = 0.25;
/// A line is drawn at most so many times as far as its points reach back.
const STRETCH: f64 = 3.0;
/// Both tails of a 90 % interval, in standard deviations.
const Z: f64 = 1.645;
/// A drop by so much of the limit between two points is a new life: the service was restarted or something was freed.
const FALL: f64 = 0.2;

/// One resource of one service, as shares of its limit over time.
#[derive(Clone)]
pub struct Track {
    horizons: Vec<Horizon>,
    step_s: f64,
    points_max: usize,
    points: VecDeque<(f64, f64)>,
    /// The point that is being gathered.
    open: Option<Bucket>,
    latest: Option<(f64, f64)>,
    forecasts: Vec<Forecasts>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Which place on the grid of steps.
    cell: f64,
    begin_s: f64,
    last_s: f64,
    sum: f64,
    count: u32,
    highest: f64,
}

/// Forecasts of one horizon that are still open, and how far off the former ones were.
#[derive(Debug, Clone, Default)]
struct Forecasts {
    open: VecDeque<Forecast>,
    errors: VecDeque<f64>,
    last_s: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Forecast {
    due_s: f64,
    value: f64,
    highest: f64,
}

/// A line through the last points of a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// Growth per second, in shares of the limit.
    pub slope: f64,
    /// Its value now.
    pub level: f64,
    /// Kendall's τ: pairs that rise less pairs that fall, −1 to 1.
    pub rising: f64,
    /// Median distance of the points from the line.
    pub noise: f64,
}

/// What is known of a resource now.
#[derive(Clone, Copy)]
pub struct Course<'a> {
    track: &'a Track,
    now_s: f64,
    value: f64,
}

impl std::fmt::Debug for Track {
    /// Prints no value: raw data stay on the host, logs included.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Track")
            .field("points", &self.points.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Course<'_> {
    /// Prints no value either.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Course").finish_non_exhaustive()
    }
}

/// What the line says.
#[derive(Debug, Clone, PartialEq)]
pub struct Extrapolation {
    /// One for each horizon.
    pub chances: Vec<Result<Chance, Abstain>>,
    /// When the limit is reached, in seconds, with an open end; `None` while nothing grows.
    pub lead: Option<LeadTime>,
}

/// A limit: finite and above 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit(f64);

impl Limit {
    /// A limit in the resource's own unit.
    ///
    /// # Errors
    /// [`RiskError::Limit`] unless it is finite and above 0.
    pub fn new(limit: f64) -> Result<Self, RiskError> {
        if limit.is_finite() && limit > 0.0 {
            Ok(Self(limit))
        } else {
            Err(RiskError::Limit { limit })
        }
    }

    /// `value` as a share of the limit.
    pub fn share(self, value: f64) -> f64 {
        value / self.0
    }
}

impl Track {
    /// Nothing seen yet. The longest horizon decides how long is remembered: as long as it looks ahead. A point is a 180th of it, or a twelfth of
    /// the shortest horizon where that is less.
    ///
    /// # Errors
    /// [`RiskError::Edges`] unless there is a horizon, they ascend, and the longest is at most [`HORIZON_RATIO_MAX`] times the shortest.
    pub fn new(horizons: &[Horizon]) -> Result<Self, RiskError> {
        let ascending = horizons.windows(2).all(|pair| pair[0] < pair[1]);
        let (Some(shortest), Some(longest), true) = (horizons.first(), horizons.last(), ascending) else {
            return Err(RiskError::Edges);
        };
        if longest.seconds() > f64::from(HORIZON_RATIO_MAX) * shortest.seconds() * (1.0 + 1e-9) {
            return Err(RiskError::Edges);
        }
        let wanted = (POINTS_SHORTEST * longest.seconds() / shortest.seconds()).clamp(POINTS, POINTS_MAX);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "within 180 and 4 320"
        )]
        let points_max = wanted.ceil() as usize;
        Ok(Self {
            horizons: horizons.to_vec(),
            step_s: longest.seconds() / wanted,
            points_max,
            points: VecDeque::new(),
            open: None,
            latest: None,
            forecasts: vec![Forecasts::default(); horizons.len()],
        })
    }

    /// Adds the share of the limit in use at `now_s`, seconds of a clock of the caller's that never stands still. A share
    /// that is not finite is left out. When the time does not move on, or the share falls by a fifth of the limit, a new life begins:
    /// the points are dropped, what was learnt of errors stays.
    pub fn push(&mut self, now_s: f64, share: f64) {
        if !share.is_finite() || !now_s.is_finite() {
            return;
        }
        if let Some((before_s, before)) = self.latest
            && (now_s <= before_s || share < before - FALL)
        {
            self.restart();
        }
        // On a fixed grid: were a point a step after the one before, samples a little closer than a step would make points two samples apart.
        let cell = ((now_s + 1e-9) / self.step_s).floor();
        if self.open.is_some_and(|open| open.cell < cell) {
            self.close();
        }
        self.latest = Some((now_s, share));
        let open = self.open.get_or_insert(Bucket {
            cell,
            begin_s: now_s,
            last_s: now_s,
            sum: 0.0,
            count: 0,
            highest: f64::NEG_INFINITY,
        });
        open.last_s = now_s;
        open.sum += share;
        open.count += 1;
        open.highest = open.highest.max(share);
    }

    /// Begins a new life: a restarted service has nothing to do with the points before. What was learnt of errors stays.
    pub fn restart(&mut self) {
        self.points.clear();
        self.open = None;
        self.latest = None;
        for forecasts in &mut self.forecasts {
            forecasts.open.clear();
            forecasts.last_s = None;
        }
    }

    /// What is known now; `None` before the first share.
    pub fn course(&self) -> Option<Course<'_>> {
        let (now_s, value) = self.latest?;
        Some(Course {
            track: self,
            now_s,
            value,
        })
    }

    /// What the line says now.
    ///
    /// # Errors
    /// [`Abstain::Missing`] before the first share. Each horizon may abstain by itself.
    pub fn extrapolate(&self) -> Result<Extrapolation, Abstain> {
        let course = self.course().ok_or(Abstain::Missing)?;
        let mut chances: Vec<Result<Chance, Abstain>> = Vec::with_capacity(self.horizons.len());
        for (horizon, forecasts) in self.horizons.iter().zip(&self.forecasts) {
            let chance = course
                .steady_line(horizon.seconds())
                .map(|line| forecasts.chance(&line, *horizon, self.step_s))
                .ok_or(Abstain::TooShort);
            let before = chances.last().and_then(|before| before.ok());
            chances.push(chance.map(|chance| match before {
                Some(before) => Chance::new(
                    chance.probability.max(before.probability),
                    chance.low.max(before.low),
                    chance.high.max(before.high),
                ),
                None => chance,
            }));
        }
        Ok(Extrapolation {
            chances,
            lead: self.lead(&course),
        })
    }

    /// Ends the open point, settles the forecasts that are due and puts new ones aside.
    fn close(&mut self) {
        let Some(bucket) = self.open.take() else { return };
        let now_s = bucket.last_s;
        if self.points.len() == self.points_max + 1 {
            self.points.pop_front();
        }
        let middle = f64::midpoint(bucket.begin_s, bucket.last_s);
        self.points
            .push_back((middle, bucket.sum / f64::from(bucket.count)));
        for forecasts in &mut self.forecasts {
            forecasts.settle(now_s, bucket.highest);
        }
        let (horizons, step_s) = (self.horizons.clone(), self.step_s);
        for (at, horizon) in horizons.iter().enumerate() {
            let every = (horizon.seconds() / FORECASTS_PER_HORIZON).max(step_s);
            let last = self.forecasts[at].last_s;
            if last.is_some_and(|last| now_s - last + 1e-9 < every) {
                continue;
            }
            let line = self
                .course()
                .and_then(|course| course.steady_line(horizon.seconds()));
            if let Some(line) = line {
                self.forecasts[at].put_aside(now_s, horizon.seconds(), &line);
            }
        }
    }

    /// From the line of the shortest window whose length is at least the time that it gives: a limit that is near is
    /// judged by what happens now, one that is far by what lasts.
    fn lead(&self, course: &Course<'_>) -> Option<LeadTime> {
        let mut found = None;
        for (horizon, forecasts) in self.horizons.iter().zip(&self.forecasts) {
            let Some(line) = course.steady_line(horizon.seconds()) else {
                continue;
            };
            let headroom = (1.0 - line.level).max(0.0);
            let expected = if line.slope > 0.0 {
                headroom / line.slope
            } else {
                f64::INFINITY
            };
            let error = forecasts.slope_error(horizon.seconds(), &line);
            let lead = LeadTime {
                low: headroom / (line.slope + error).max(1e-12),
                expected,
                // A line does not know whether the growth goes on: half of those that look like leaks end by themselves.
                high: None,
            };
            found = Some((horizon.seconds(), lead));
            if expected <= horizon.seconds() {
                break;
            }
        }
        let (window, lead) = found?;
        // A line says nothing of times many windows away.
        (lead.expected <= 4.0 * window).then_some(lead)
    }
}

impl Course<'_> {
    /// Share of the limit that is left, below 0 past the limit.
    pub fn headroom(&self) -> f64 {
        1.0 - self.value
    }

    /// For how long points are known.
    pub fn history_s(&self) -> f64 {
        self.track
            .points
            .front()
            .map_or(0.0, |first| self.now_s - first.0)
    }

    /// The line through the last `window_s` seconds, or through as much of it as there is; `None` with fewer than six
    /// points.
    pub fn line(&self, window_s: f64) -> Option<Line> {
        let points = &self.track.points;
        let first = points.partition_point(|(at, _)| *at < self.now_s - window_s - 1e-9);
        let count = points.len() - first;
        if count < LINE_POINTS_MIN {
            return None;
        }
        let stride = count.div_ceil(LINE_POINTS_MAX);
        // Counted from the newest, which always takes part.
        let chosen: Vec<(f64, f64)> = points
            .iter()
            .rev()
            .take(count)
            .step_by(stride)
            .map(|(at, share)| (at - self.now_s, *share))
            .collect();
        Some(theil_sen(&chosen))
    }
}

impl Course<'_> {
    /// The line that is drawn ahead: its slope counts as far as the points really rise or fall together (times τ²), so that
    /// noise and saw teeth are not drawn out into a leak. `None` when the points do not reach back a third of the horizon.
    fn steady_line(&self, horizon_s: f64) -> Option<Line> {
        let line = self.line(horizon_s)?;
        let reaches = STRETCH * self.history_s() >= horizon_s;
        reaches.then_some(Line {
            slope: line.slope * line.rising * line.rising,
            ..line
        })
    }
}

impl Forecasts {
    fn settle(&mut self, now_s: f64, highest: f64) {
        for forecast in &mut self.open {
            forecast.highest = forecast.highest.max(highest);
        }
        while self
            .open
            .front()
            .is_some_and(|forecast| forecast.due_s <= now_s + 1e-9)
        {
            let Some(forecast) = self.open.pop_front() else {
                break;
            };
            if self.errors.len() == ERRORS_MAX {
                self.errors.pop_front();
            }
            self.errors.push_back(forecast.highest - forecast.value);
        }
    }

    fn put_aside(&mut self, now_s: f64, ahead_s: f64, line: &Line) {
        self.last_s = Some(now_s);
        self.open.push_back(Forecast {
            due_s: now_s + ahead_s,
            value: line.level + line.slope * ahead_s,
            highest: f64::NEG_INFINITY,
        });
    }

    fn chance(&self, line: &Line, horizon: Horizon, step_s: f64) -> Chance {
        let ahead = horizon.seconds();
        let room = 1.0 - (line.level + line.slope * ahead);
        let count = self.errors.len();
        if count < ERRORS_MIN {
            let deviation = doubt(line, ahead).max(1e-9);
            let chance = |shift: f64| normal_cdf((-room + shift * deviation) / deviation);
            return Chance::new(chance(0.0), chance(-1.0), chance(1.0));
        }
        let over = self.errors.iter().filter(|error| **error >= room).count() as f64;
        let probability = (over + 0.5) / (count as f64 + 1.0);
        // Forecasts within one horizon of each other share most of their error.
        let every = (ahead / FORECASTS_PER_HORIZON).max(step_s);
        let independent = 1.0 + count as f64 * every / ahead;
        let (low, high) = wilson(over / count as f64, independent);
        Chance::new(probability, low, high)
    }

    /// How much the slope may be off, per second: nine of ten past forecasts were off by less.
    fn slope_error(&self, ahead_s: f64, line: &Line) -> f64 {
        if self.errors.len() < ERRORS_MIN {
            return Z * doubt(line, ahead_s) / ahead_s;
        }
        let mut errors: Vec<f64> = self.errors.iter().map(|error| error.abs() / ahead_s).collect();
        errors.sort_by(f64::total_cmp);
        errors[(errors.len() * 9 / 10).min(errors.len() - 1)]
    }
}

/// Standard deviation of a forecast before there are errors.
fn doubt(line: &Line, ahead_s: f64) -> f64 {
    (DOUBT * line.slope.abs() * ahead_s).hypot(1.4826 * line.noise)
}

/// Median of all pairwise slopes and of the intercepts at time 0, which is now. Points are newest first.
fn theil_sen(points: &[(f64, f64)]) -> Line {
    let mut slopes = Vec::with_capacity(points.len() * (points.len() - 1) / 2);
    let (mut up, mut down) = (0_u32, 0_u32);
    for (i, later) in points.iter().enumerate() {
        for earlier in &points[i + 1..] {
            let (time, growth) = (later.0 - earlier.0, later.1 - earlier.1);
            if time > 0.0 {
                slopes.push(growth / time);
                up += u32::from(growth > 0.0);
                down += u32::from(growth < 0.0);
            }
        }
    }
    let pairs = slopes.len().max(1) as f64;
    let slope = median(&mut slopes);
    let mut levels: Vec<f64> = points.iter().map(|(at, share)| share - slope * at).collect();
    let level = median(&mut levels);
    let mut distances: Vec<f64> = levels.iter().map(|intercept| (intercept - level).abs()).collect();
    Line {
        slope,
        level,
        rising: (f64::from(up) - f64::from(down)) / pairs,
        noise: median(&mut distances),
    }
}

/// The middle value, 0 of none; the upper one of an even number.
fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// 90 % interval of a share of `count` independent trials (Wilson, 1927).
fn wilson(share: f64, count: f64) -> (f64, f64) {
    let z2 = Z * Z / count;
    let centre = (share + z2 / 2.0) / (1.0 + z2);
    let half = (Z / (1.0 + z2)) * (share * (1.0 - share) / count + z2 / (4.0 * count)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

/// Standard normal distribution, to 1e-7 (Abramowitz and Stegun, 26.2.17).
fn normal_cdf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let poly = t
        * (0.319_381_530
            + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly;
    if x >= 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn track() -> Track {
        Track::new(&Horizon::DEFAULT).unwrap()
    }

    /// One share a second from `start_s`.
    fn feed(track: &mut Track, start_s: u32, shares: impl Iterator<Item = f64>) {
        for (second, share) in (start_s..).zip(shares) {
            track.push(f64::from(second), share);
        }
    }

    fn wave(second: u32) -> f64 {
        0.4 + 0.01 * (f64::from(second) / 7.0).sin()
    }

    #[test]
    fn a_straight_ramp_is_foretold_to_the_second() {
        let mut track = track();
        feed(&mut track, 0, (0..600).map(|s| 0.2 + f64::from(s) / 1000.0));
        let lead = track.extrapolate().unwrap().lead.unwrap();
        assert!((lead.expected - 201.0).abs() < 3.0, "{lead:?}");
        assert!(lead.covers(201.0));
        let chances: Vec<f64> = track
            .extrapolate()
            .unwrap()
            .chances
            .into_iter()
            .map(|chance| chance.unwrap().probability)
            .collect();
        assert!(
            chances[0] < 0.05 && chances[1] > 0.9 && chances[2] > 0.9,
            "{chances:?}"
        );
    }

    #[test]
    fn a_quiet_resource_is_no_risk_and_has_no_time() {
        let mut track = track();
        feed(&mut track, 0, (0..4000).map(wave));
        let said = track.extrapolate().unwrap();
        for chance in said.chances {
            let chance = chance.unwrap();
            assert!(chance.probability < 0.06 && chance.low < 0.01, "{chance:?}");
        }
        assert_eq!(said.lead, None);
    }

    #[test]
    fn a_spike_does_not_bend_the_line() {
        let mut track = track();
        feed(
            &mut track,
            0,
            (0..900).map(|s| if s % 100 == 99 { 0.59 } else { wave(s) }),
        );
        let line = track.course().unwrap().line(900.0).unwrap();
        assert!(line.slope.abs() * 900.0 < 0.01, "{line:?}");
    }

    #[test]
    fn a_resource_that_often_jumps_is_more_of_a_risk_than_its_line_says() {
        let jumps = |height: f64| {
            let mut track = track();
            feed(
                &mut track,
                0,
                (0..6000).map(|s| if s % 50 < 5 { 0.85 + height } else { 0.85 }),
            );
            track.extrapolate().unwrap().chances[0].unwrap().probability
        };
        assert!(jumps(0.16) > 0.5, "every minute had a jump over the limit");
        assert!(jumps(0.05) < 0.05);
    }

    #[test]
    fn few_points_abstain_and_later_ones_do_not() {
        let mut track = track();
        assert_eq!(track.extrapolate(), Err(Abstain::Missing));
        feed(&mut track, 0, (0..10).map(wave));
        assert_eq!(track.extrapolate().unwrap().chances[0], Err(Abstain::TooShort));
        feed(&mut track, 10, (0..40).map(wave));
        assert!(track.extrapolate().unwrap().chances[0].is_ok());
    }

    #[test]
    fn a_restart_and_a_clock_that_runs_backwards_begin_a_new_life() {
        let mut track = track();
        feed(&mut track, 0, (0..600).map(|s| 0.2 + f64::from(s) / 1000.0));
        track.push(600.0, 0.1);
        assert_eq!(
            track.extrapolate().unwrap().chances[0],
            Err(Abstain::TooShort),
            "freed"
        );
        feed(&mut track, 601, (0..100).map(|_| 0.1));
        assert!(track.extrapolate().unwrap().chances[0].unwrap().probability < 0.1);
        track.push(5.0, 0.1);
        assert_eq!(
            track.extrapolate().unwrap().chances[0],
            Err(Abstain::TooShort),
            "clock"
        );
    }

    #[test]
    fn missing_values_are_left_out_and_constant_ones_are_no_obstacle() {
        let mut track = track();
        feed(
            &mut track,
            0,
            (0..900).map(|s| if s % 3 == 0 { f64::NAN } else { 0.5 }),
        );
        let said = track.extrapolate().unwrap();
        assert!(said.chances[2].unwrap().probability < 0.1 && said.lead.is_none());
    }

    #[test]
    fn debug_prints_no_measurement() {
        let mut track = track();
        feed(&mut track, 0, (0..20).map(|_| 0.123_456));
        assert_eq!(format!("{track:?}"), "Track { points: 3, .. }");
        assert_eq!(format!("{:?}", track.course().unwrap()), "Course { .. }");
    }

    #[test]
    fn a_limit_of_nothing_is_refused() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(Limit::new(bad), Err(RiskError::Limit { .. })));
        }
        assert!((Limit::new(4.0).unwrap().share(1.0) - 0.25).abs() < 1e-12);
    }

    #[test]
    fn past_the_limit_is_certain() {
        let mut track = track();
        feed(&mut track, 0, (0..2000).map(|s| 0.5 + f64::from(s) / 3000.0));
        let said = track.extrapolate().unwrap();
        assert!(said.chances[0].unwrap().probability > 0.9);
        assert!(said.lead.unwrap().low < 1.0);
    }

    #[test]
    fn short_horizons_remember_less() {
        let seconds = |s| Horizon::new(Duration::from_secs(s)).unwrap();
        let mut track = Track::new(&[seconds(5), seconds(30)]).unwrap();
        for tenth in 0..100 {
            track.push(f64::from(tenth) / 10.0, 0.5 + f64::from(tenth) / 250.0);
        }
        let lead = track.extrapolate().unwrap().lead.unwrap();
        assert!((lead.expected - 2.6).abs() < 0.3, "{lead:?}");
        assert!(matches!(Track::new(&[]), Err(RiskError::Edges)));
        assert!(matches!(
            Track::new(&[seconds(9), seconds(5)]),
            Err(RiskError::Edges)
        ));
    }

    #[test]
    fn every_allowed_pair_of_horizons_and_interval_has_a_line_for_each() {
        let horizons = |list: &[u64]| -> Vec<Horizon> {
            list.iter()
                .map(|s| Horizon::new(Duration::from_secs(*s)).unwrap())
                .collect()
        };
        for (list, interval_ms) in [
            (&[60, 3_600][..], 1_000_u32),
            (&[60, 300, 1_800], 1_000),
            (&[240, 86_400], 1_000),
            (&[300, 900], 15_000),
            (&[120, 900], 15_000),
            (&[480, 900], 60_000),
            (&[1, 360], 100),
            (&[1], 125),
            (&[86_400], 60_000),
        ] {
            let mut track = Track::new(&horizons(list)).unwrap();
            let longest = u32::try_from(*list.last().unwrap()).unwrap();
            let (rows, interval) = (1_500 * longest / interval_ms, f64::from(interval_ms) / 1000.0);
            let mut said = 0;
            for row in 0..rows {
                let now_s = f64::from(row) * interval;
                track.push(now_s, 0.2 + 0.3 * f64::from(row) / f64::from(rows));
                if row > rows - rows / 6 {
                    let chances = track.extrapolate().unwrap().chances;
                    assert!(
                        chances.iter().all(Result::is_ok),
                        "{list:?} at {interval} s, row {row}: {chances:?}"
                    );
                    said += 1;
                }
            }
            assert!(said > 0);
        }
        assert!(matches!(Track::new(&horizons(&[1, 361])), Err(RiskError::Edges)));
        // Every interval that eight samples of the shortest horizon allow, and a clock that is a little off each time.
        for tenths in 1..=75_u32 {
            let mut track = Track::new(&Horizon::DEFAULT).unwrap();
            let interval = f64::from(tenths) / 10.0;
            let rows = 15_000 / tenths;
            for row in 0..rows {
                let jitter = 0.002 * (f64::from(row * 7 % 11) / 5.0 - 1.0);
                track.push(
                    f64::from(row) * interval + jitter,
                    0.2 + 0.3 * f64::from(row) / f64::from(rows),
                );
                if row > rows / 2 {
                    let chances = track.extrapolate().unwrap().chances;
                    assert!(
                        chances.iter().all(Result::is_ok),
                        "every {interval} s, row {row}: {chances:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn normal_and_wilson_agree_with_tables() {
        assert!((normal_cdf(1.645) - 0.95).abs() < 1e-4 && (normal_cdf(-1.0) - 0.158_655).abs() < 1e-5);
        let (low, high) = wilson(0.1, 100.0);
        // The closed form, computed in Python: p = 0.1, n = 100, z = 1.645.
        assert!(
            (low - 0.060_716).abs() < 1e-6 && (high - 0.160_362).abs() < 1e-6,
            "{low} {high}"
        );
    }
}
