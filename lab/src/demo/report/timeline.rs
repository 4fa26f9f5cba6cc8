//! The picture of the demo: one row an edge with its score against the threshold, faults and actions where they
//! happened, and below them the rounds, all on one time axis.

use std::fmt::Write as _;

use super::markup::{counted, escape, seconds};
use crate::demo::record::{EdgeRecord, FaultRecord, Record, ScorePoint};

/// Sizes of one drawing, in pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    /// Whole width.
    width: f64,
    /// Room for labels left of the plots.
    gutter: f64,
    /// Height of one edge's plot.
    row: f64,
    /// Pixels between time labels, at least.
    tick: f64,
    class: &'static str,
}

/// For a desk.
pub(super) const WIDE: Size = Size {
    width: 1000.0,
    gutter: 116.0,
    row: 74.0,
    tick: 80.0,
    class: "wide",
};
/// For a telephone.
pub(super) const NARROW: Size = Size {
    width: 304.0,
    gutter: 30.0,
    row: 60.0,
    tick: 56.0,
    class: "narrow",
};

/// Room above a plot for its name and the fault's label.
const HEAD: f64 = 22.0;
const RIGHT: f64 = 10.0;
const LANE: f64 = 46.0;
/// Lowest score drawn, in multiples of the threshold.
const RATIO_MIN: f64 = 0.125;
/// A gap longer than this breaks the line: nothing was measured.
const GAP_S: f64 = 3.0;

/// Draws `record`.
pub(super) fn draw(record: &Record, size: Size) -> String {
    let mut canvas = Canvas::new(record, size);
    for edge in &record.edges {
        canvas.edge(edge, record.faults.iter().filter(|fault| fault.edge == edge.name));
    }
    canvas.rounds(record);
    canvas.axis();
    canvas.finish()
}

/// The drawings in the legend, with their words.
pub(super) fn legend() -> [(&'static str, &'static str); 8] {
    [
        (
            r#"<path class="score" d="M1 9 6 5 11 8 17 3" />"#,
            "anomaly score, in multiples of the alarm threshold",
        ),
        (r#"<path class="limit" d="M1 6h16" />"#, "threshold (1×)"),
        (
            r#"<path class="inject" d="M9 0v12" /><path class="inject-head" d="M5 0h8l-4 5z" />"#,
            "fault injected",
        ),
        (
            r#"<path class="healed" d="M9 0v12" />"#,
            "service verified healthy",
        ),
        (r#"<path class="act" d="M4 11h10l-5-8z" />"#, "action by the edge"),
        (
            r#"<path class="stop" d="M9 1l5 5-5 5-5-5z" />"#,
            "privacy budget spent",
        ),
        (
            r#"<rect class="published" x="7" y="1" width="4" height="10" />"#,
            "round that published, by updates taken",
        ),
        (
            r#"<rect class="inject-head" x="7" y="1" width="4" height="10" />"#,
            "updates refused",
        ),
    ]
}

struct Canvas {
    size: Size,
    body: String,
    /// Top of the next row.
    y: f64,
    end_s: f64,
    ratio_max: f64,
}

impl Canvas {
    fn new(record: &Record, size: Size) -> Self {
        let ratios = record
            .edges
            .iter()
            .flat_map(|edge| &edge.scores)
            .map(|point| ratio(*point));
        let highest = ratios.filter(|r| r.is_finite()).fold(1.0_f64, f64::max);
        let ratio_max = [4.0, 16.0, 64.0]
            .into_iter()
            .find(|top| highest <= *top)
            .unwrap_or(64.0);
        Self {
            size,
            body: String::new(),
            y: 4.0,
            end_s: record.seconds.max(1.0),
            ratio_max,
        }
    }

    fn add(&mut self, markup: &str) {
        self.body.push_str(markup);
    }

    /// Names stand above the rows, not beside them.
    fn is_narrow(&self) -> bool {
        self.size.gutter < 60.0
    }

    fn x(&self, at_s: f64) -> f64 {
        let width = self.size.width - self.size.gutter - RIGHT;
        self.size.gutter + (at_s / self.end_s).clamp(0.0, 1.0) * width
    }

    /// Where a score of `ratio` thresholds lies in a plot whose upper edge is `top`; logarithmic.
    fn level(&self, top: f64, ratio: f64) -> f64 {
        let span = (self.ratio_max / RATIO_MIN).log2();
        let share = (ratio.clamp(RATIO_MIN, self.ratio_max) / RATIO_MIN).log2() / span;
        top + (1.0 - share) * self.size.row
    }

    fn edge<'a>(&mut self, edge: &EdgeRecord, faults: impl Iterator<Item = &'a FaultRecord>) {
        let top = self.y + HEAD;
        let bottom = top + self.size.row;
        let right = self.size.width - RIGHT;
        self.name(edge, top);
        for (value, label) in [
            (0.25, "¼×"),
            (1.0, "1×"),
            (4.0, "4×"),
            (16.0, "16×"),
            (64.0, "64×"),
        ] {
            if value > self.ratio_max || (value > 4.0 && value < self.ratio_max) {
                continue;
            }
            let (x, y) = (self.size.gutter, self.level(top, value));
            let class = if (value - 1.0).abs() < 1e-9 {
                "limit"
            } else {
                "grid"
            };
            let label = if self.is_narrow() && class == "grid" {
                ""
            } else {
                label
            };
            self.add(&format!(
                r#"<path class="{class}" d="M{x:.1} {y:.1}H{right:.1}" /><text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#,
                x - 6.0,
                y + 4.0,
            ));
        }
        self.add(&format!(
            r#"<path class="base" d="M{:.1} {bottom:.1}H{right:.1}" />"#,
            self.size.gutter
        ));
        self.learning(edge, top);
        let faults: Vec<&FaultRecord> = faults.collect();
        for fault in &faults {
            self.window(fault, top, bottom);
        }
        self.line(&edge.scores, top, bottom);
        for fault in &faults {
            self.fault(fault, top, bottom);
        }
        for mark in &edge.actions {
            let x = self.x(mark.at_s);
            self.add(&format!(
                r#"<path class="act" d="M{:.1} {bottom:.1}h11l-5.5 -9z"><title>{} s: {} ({})</title></path>"#,
                x - 5.5,
                whole_seconds(mark.at_s),
                escape(&mark.action),
                escape(&mark.class),
            ));
        }
        if let Some(at_s) = edge.budget_spent_s {
            let (x, y) = (self.x(at_s), bottom - 6.0);
            self.add(&format!(
                r#"<path class="stop" d="M{x:.1} {:.1}l6 6 -6 6 -6 -6z"><title>{} s: privacy budget spent, training stops</title></path>"#,
                y - 6.0,
                whole_seconds(at_s),
            ));
        }
        self.y = bottom + if self.is_narrow() { 10.0 } else { 6.0 };
    }

    fn name(&mut self, edge: &EdgeRecord, top: f64) {
        let (class, role) = if edge.hostile {
            ("name liar", "hostile")
        } else {
            ("name", "")
        };
        let name = escape(&edge.name);
        if self.is_narrow() {
            let role = if role.is_empty() {
                String::new()
            } else {
                format!(" ({role})")
            };
            self.add(&format!(
                r#"<text class="{class}" x="0" y="{:.1}">{name}{role}</text>"#,
                top - 8.0
            ));
        } else {
            self.add(&format!(
                r#"<text class="{class}" x="0" y="{:.1}">{name}</text>"#,
                top + 13.0
            ));
            self.add(&format!(r#"<text x="0" y="{:.1}">{role}</text>"#, top + 30.0));
        }
    }

    /// From the start until the first score the edge was still learning what is normal.
    fn learning(&mut self, edge: &EdgeRecord, top: f64) {
        let until = edge.scores.first().map_or(self.end_s, |point| point.at_s);
        let (from, to) = (self.x(0.0), self.x(until));
        let (width, height) = (to - from, self.size.row);
        if width < 3.0 {
            return;
        }
        self.add(&format!(
            r#"<rect class="learning" x="{from:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}" />"#
        ));
        if width > 62.0 {
            let (x, y) = (f64::midpoint(from, to), top + height / 2.0 + 4.0);
            self.add(&format!(
                r#"<text x="{x:.1}" y="{y:.1}" text-anchor="middle">learning</text>"#
            ));
        }
    }

    fn window(&mut self, fault: &FaultRecord, top: f64, bottom: f64) {
        let from = self.x(fault.injected_s);
        let to = self.x(fault
            .healed_s
            .map_or(self.end_s, |after| fault.injected_s + after));
        let (width, height) = ((to - from).max(1.5), bottom - top);
        self.add(&format!(
            r#"<rect class="window" x="{from:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}" />"#
        ));
    }

    fn fault(&mut self, fault: &FaultRecord, top: f64, bottom: f64) {
        let x = self.x(fault.injected_s);
        self.add(&format!(
            r#"<path class="inject" d="M{x:.1} {top:.1}V{bottom:.1}" /><path class="inject-head" d="M{:.1} {:.1}h10l-5 6z" />"#,
            x - 5.0,
            top - 3.0,
        ));
        let mut end = x;
        if let Some(after) = fault.healed_s {
            end = self.x(fault.injected_s + after);
            self.add(&format!(
                r#"<path class="healed" d="M{end:.1} {top:.1}V{bottom:.1}" />"#
            ));
        }
        let outcome = fault.healed_s.map_or_else(
            || r#"<tspan class="mark">not healed</tspan>"#.to_owned(),
            |after| format!(r#"<tspan class="done">healed in {}</tspan>"#, seconds(after)),
        );
        let title = escape(&fault.title);
        let y = top - 8.0;
        let room = self.size.width - RIGHT - end;
        let (x, anchor) = if room > 190.0 && !self.is_narrow() {
            (x - 4.0, "start")
        } else {
            (self.size.width - RIGHT, "end")
        };
        self.add(&format!(
            r#"<text class="halo" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}"><tspan class="mark">{title}</tspan> {outcome}</text>"#
        ));
    }

    fn line(&mut self, scores: &[ScorePoint], top: f64, bottom: f64) {
        let limit = self.level(top, 1.0);
        for piece in self.pieces(scores) {
            let points: Vec<(f64, f64)> = piece.iter().map(|(x, r)| (*x, self.level(top, *r))).collect();
            let Some((first, last)) = points.first().zip(points.last()) else {
                continue;
            };
            let mut path = String::new();
            for (index, (x, y)) in points.iter().enumerate() {
                write!(path, "{}{x:.1} {y:.1}", if index == 0 { "M" } else { "L" }).unwrap_or_default();
            }
            let (from, to) = (first.0, last.0);
            self.add(&format!(
                r#"<path class="area" d="{path}L{to:.1} {bottom:.1}L{from:.1} {bottom:.1}Z" /><path class="score" d="{path}" />"#
            ));
            // What lies above the threshold is drawn once more, in the colour of alarm.
            let mut above = String::new();
            let mut drawing = false;
            for pair in points.windows(2) {
                let over = pair[1].1 < limit || pair[0].1 < limit;
                if over {
                    let clip = |y: f64| y.min(limit);
                    if !drawing {
                        write!(above, "M{:.1} {:.1}", pair[0].0, clip(pair[0].1)).unwrap_or_default();
                    }
                    write!(above, "L{:.1} {:.1}", pair[1].0, clip(pair[1].1)).unwrap_or_default();
                }
                drawing = over;
            }
            if !above.is_empty() {
                self.add(&format!(r#"<path class="over-line" d="{above}" />"#));
            }
        }
    }

    /// Scores as (pixel, ratio), the highest of each pixel, broken where nothing was measured.
    fn pieces(&self, scores: &[ScorePoint]) -> Vec<Vec<(f64, f64)>> {
        let mut pieces: Vec<Vec<(f64, f64)>> = Vec::new();
        let mut last_s = f64::NEG_INFINITY;
        for point in scores.iter().filter(|point| ratio(**point).is_finite()) {
            let (x, value) = (self.x(point.at_s), ratio(*point));
            let starts = point.at_s - last_s > GAP_S;
            last_s = point.at_s;
            match pieces.last_mut() {
                Some(piece) if !starts => match piece.last_mut() {
                    Some((at, highest)) if x - *at < 1.0 => *highest = highest.max(value),
                    _ => piece.push((x, value)),
                },
                _ => pieces.push(vec![(x, value)]),
            }
        }
        pieces
    }

    /// Bars at the end of each round: updates taken, and refused ones on top.
    fn rounds(&mut self, record: &Record) {
        let top = self.y + 10.0;
        let bottom = top + LANE;
        let right = self.size.width - RIGHT;
        let most = record
            .rounds
            .iter()
            .map(|r| r.accepted + r.refused)
            .max()
            .unwrap_or(0)
            .max(1);
        let unit = (LANE - 6.0) / most as f64;
        let x = self.size.gutter;
        if self.is_narrow() {
            self.add(&format!(
                r#"<text class="name" x="0" y="{:.1}">Rounds, updates</text>"#,
                top - 2.0
            ));
        } else {
            self.add(&format!(
                r#"<text class="name" x="0" y="{:.1}">Rounds</text>"#,
                top + 13.0
            ));
            self.add(&format!(r#"<text x="0" y="{:.1}">updates</text>"#, top + 30.0));
        }
        for value in [0, most] {
            let y = bottom - value as f64 * unit;
            self.add(&format!(
                r#"<path class="{}" d="M{x:.1} {y:.1}H{right:.1}" /><text x="{:.1}" y="{:.1}" text-anchor="end">{value}</text>"#,
                if value == 0 { "base" } else { "grid" },
                x - 6.0,
                y + 4.0,
            ));
        }
        let spacing = (right - x) / record.rounds.len().max(1) as f64;
        let width = (spacing * 0.6).clamp(1.0, 7.0);
        for round in &record.rounds {
            let x = self.x(round.ended_s) - width / 2.0;
            let (taken, refused) = (round.accepted as f64 * unit, round.refused as f64 * unit);
            let title = match round.published {
                Some(version) => format!("round {} published model {version}", round.round),
                None => format!("round {} was aborted", round.round),
            };
            let class = if round.published.is_some() {
                "published"
            } else {
                "aborted"
            };
            self.add(&format!(
                r#"<rect class="{class}" x="{x:.1}" y="{:.1}" width="{width:.1}" height="{:.1}"><title>{title}: {} taken, {} refused</title></rect>"#,
                bottom - taken.max(2.0),
                taken.max(2.0),
                counted(round.accepted, "update"),
                round.refused,
            ));
            if round.refused > 0 {
                self.add(&format!(
                    r#"<rect class="inject-head" x="{x:.1}" y="{:.1}" width="{width:.1}" height="{refused:.1}" />"#,
                    bottom - taken - refused,
                ));
            }
        }
        self.y = bottom;
    }

    fn axis(&mut self) {
        let width = self.size.width - self.size.gutter - RIGHT;
        let room = (width / self.size.tick).max(1.0);
        let step = [5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0];
        let step = step
            .into_iter()
            .find(|step| self.end_s / step <= room)
            .unwrap_or(300.0);
        let y = self.y + 18.0;
        let mut at = 0.0;
        while at <= self.end_s {
            let x = self.x(at);
            let anchor = if at == 0.0 { "start" } else { "middle" };
            let unit = if at + step > self.end_s { " s" } else { "" };
            self.add(&format!(
                r#"<path class="base" d="M{x:.1} {:.1}v5" /><text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}{unit}</text>"#,
                self.y,
                whole_seconds(at),
            ));
            at += step;
        }
        self.y = y + 8.0;
    }

    fn finish(self) -> String {
        let Self { size, body, y, .. } = self;
        let label = "Anomaly scores of every edge over time, with faults, actions and rounds";
        format!(
            r#"<svg class="{}" viewBox="0 0 {:.0} {y:.0}" width="{:.0}" height="{y:.0}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">{body}</svg>"#,
            size.class, size.width, size.width,
        )
    }
}

/// The score in multiples of its threshold; not finite when there was no threshold.
fn ratio(point: ScorePoint) -> f64 {
    if point.threshold > 0.0 {
        f64::from(point.score) / f64::from(point.threshold)
    } else {
        f64::NAN
    }
}

fn whole_seconds(at_s: f64) -> String {
    format!("{at_s:.0}")
}
