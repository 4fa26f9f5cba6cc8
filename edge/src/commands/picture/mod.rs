//! `score --plot`: a recording and what the detector says about it, on one page.
//!
//! ```text
//! ┌ title and legend ────────────────────────────────────────────┐
//! │ score, threshold, alarms │ the strongest │ alarms by highest │
//! │ metric of the causes     │ alarm, close  │ score, each with  │
//! │ …                        │ up            │ its ranked causes │
//! └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! An SVG for a light background, drawn in memory. Lines are reduced to the extremes of each pixel column, so a month of
//! minutes is a few hundred kilobytes and a single spike stays visible.

mod axis;
mod clock;
mod panel;
mod ranking;
#[cfg(test)]
mod tests;

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;
use theriac_model::causes::{ChannelCause, Explained, ExplainedAlarm};
use theriac_model::detector::Detector;
use theriac_model::series::Series;

use panel::Panel;

pub(super) use clock::Clock;

/// Where things are drawn.
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Why nothing was drawn: the backend writes to memory, so it is a bug, told as words.
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

const WIDTH: u32 = 1_440;
const HEADER: u32 = 74;
const SCORE_HEIGHT: u32 = 210;
const METRIC_HEIGHT: u32 = 112;
/// Room for the labels of the time axis.
const TIME_LABELS: u32 = 40;
const OVERVIEW_WIDTH: u32 = 640;
const CLOSE_UP_WIDTH: u32 = 400;
/// Most metrics shown.
const METRICS_MAX: usize = 6;
/// Most alarms listed.
const ALARMS_MAX: usize = 6;
/// Fewest rows shown on both sides of the strongest alarm.
const CLOSE_UP_ROWS_MIN: usize = 30;

const INK: RGBColor = RGBColor(0x22, 0x2b, 0x35);
const PALE_INK: RGBColor = RGBColor(0x66, 0x70, 0x7c);
const GRID: RGBColor = RGBColor(0xe3, 0xe7, 0xeb);
const SCORE: RGBColor = RGBColor(0x1f, 0x4e, 0x8c);
const METRIC: RGBColor = RGBColor(0x1c, 0x7c, 0x71);
const ALARM: RGBColor = RGBColor(0xc2, 0x3b, 0x22);
const USUAL: RGBColor = RGBColor(0x1c, 0x7c, 0x71);

/// What is drawn.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) title: String,
    pub(super) detector: &'a Detector,
    pub(super) series: &'a Series,
    pub(super) explained: &'a Explained,
    pub(super) clock: Clock,
}

/// The picture as SVG.
///
/// # Errors
/// What the drawing library says.
pub(super) fn svg(view: &View) -> Result<String, String> {
    let metrics = view.metrics();
    let panels = u32::try_from(metrics.len()).unwrap_or(0);
    let height = HEADER + SCORE_HEIGHT + panels * METRIC_HEIGHT + TIME_LABELS;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(view, &metrics, &root).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

fn draw(view: &View, metrics: &[usize], root: &Area) -> Drawn {
    root.fill(&WHITE)?;
    let (header, body) = root.split_vertically(HEADER);
    view.header(&header)?;
    // Without an alarm there is nothing to look at closely.
    let strongest = view
        .by_score()
        .first()
        .map(|(_, alarm)| close_up(alarm, view.series.rows()));
    let (plots, side) = body.split_horizontally(OVERVIEW_WIDTH + CLOSE_UP_WIDTH);
    let columns = match strongest {
        Some(rows) => {
            let (overview, close) = plots.split_horizontally(OVERVIEW_WIDTH);
            vec![
                (overview, 0..view.series.rows(), "whole recording"),
                (close, rows, "highest alarm"),
            ]
        }
        None => vec![(plots, 0..view.series.rows(), "whole recording")],
    };
    for (index, (area, rows, name)) in columns.into_iter().enumerate() {
        column(view, metrics, &area, rows, name, index == 0)?;
    }
    ranking::draw(view, &side)
}

/// One column of panels over the same rows.
fn column(
    view: &View,
    metrics: &[usize],
    area: &Area,
    rows: Range<usize>,
    name: &str,
    titles: bool,
) -> Drawn {
    let (score, below) = area.split_vertically(SCORE_HEIGHT);
    let panel = Panel::new(view, rows, titles);
    panel.score(&score, name, metrics.is_empty())?;
    let mut rest = below;
    for (index, channel) in metrics.iter().enumerate() {
        let last = index + 1 == metrics.len();
        let (here, left) = rest.split_vertically(if last {
            METRIC_HEIGHT + TIME_LABELS
        } else {
            METRIC_HEIGHT
        });
        panel.metric(&here, *channel, last)?;
        rest = left;
    }
    Ok(())
}

impl View<'_> {
    /// The alarms with their number in time, highest score first.
    fn by_score(&self) -> Vec<(usize, &ExplainedAlarm)> {
        let mut alarms: Vec<_> = self.explained.alarms.iter().enumerate().collect();
        alarms.sort_by(|a, b| b.1.score.total_cmp(&a.1.score));
        alarms
    }

    /// Channels worth a panel: the first causes of the listed alarms in turn; without alarms, those that surprised most.
    fn metrics(&self) -> Vec<usize> {
        let alarms = self.by_score();
        let listed: Vec<&[ChannelCause]> = alarms
            .iter()
            .take(ALARMS_MAX)
            .map(|(_, alarm)| &alarm.causes[..])
            .collect();
        let most = METRICS_MAX.min(self.series.channels());
        let mut chosen: Vec<usize> = Vec::new();
        let places = listed.iter().map(|causes| causes.len()).max().unwrap_or(0);
        for place in 0..places {
            for cause in listed.iter().filter_map(|causes| causes.get(place)) {
                if chosen.len() < most && !chosen.contains(&cause.channel) {
                    chosen.push(cause.channel);
                }
            }
        }
        if chosen.is_empty() {
            chosen = self.most_surprising();
            chosen.truncate(most);
        }
        chosen
    }

    fn most_surprising(&self) -> Vec<usize> {
        let channels = self.series.channels();
        let mut sums = vec![0.0_f64; channels];
        for row in self.explained.contributions.chunks_exact(channels.max(1)) {
            for (sum, contribution) in sums.iter_mut().zip(row) {
                *sum += f64::from(*contribution).powi(2);
            }
        }
        let mut order: Vec<usize> = (0..channels).collect();
        order.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]));
        order
    }

    fn header(&self, area: &Area) -> Drawn {
        let text = |size: u32, color: &RGBColor| ("sans-serif", size).into_font().color(color);
        area.draw(&Text::new(
            self.title.clone(),
            (24, 16),
            ("sans-serif", 24).into_font().style(FontStyle::Bold).color(&INK),
        ))?;
        let rows = self.series.rows();
        let alarms = self.explained.alarms.len();
        let facts = format!(
            "{rows} rows of {} metrics · {} · {alarms} {}",
            self.series.channels(),
            self.clock.span(rows),
            if alarms == 1 { "alarm" } else { "alarms" },
        );
        area.draw(&Text::new(facts, (24, 46), text(16, &PALE_INK)))?;
        let mut x = 700;
        let line = |x: i32, color: RGBColor, width: u32| {
            PathElement::new(vec![(x, 52), (x + 26, 52)], color.stroke_width(width))
        };
        for (words, kind) in [
            ("score", 0),
            ("threshold", 1),
            ("alarm", 2),
            ("metric", 3),
            ("usual range (5–95 %)", 4),
        ] {
            match kind {
                0 => area.draw(&line(x, SCORE, 2))?,
                1 => {
                    for dash in [0, 11, 22] {
                        let points = vec![(x + dash, 52), (x + dash + 6, 52)];
                        area.draw(&PathElement::new(points, ALARM.stroke_width(2)))?;
                    }
                }
                2 => area.draw(&Rectangle::new([(x, 44), (x + 26, 60)], ALARM.mix(0.16).filled()))?,
                3 => area.draw(&line(x, METRIC, 2))?,
                _ => area.draw(&Rectangle::new([(x, 44), (x + 26, 60)], USUAL.mix(0.12).filled()))?,
            }
            area.draw(&Text::new(words, (x + 34, 45), text(15, &INK)))?;
            x += 60 + 7 * i32::try_from(words.len()).unwrap_or(0);
        }
        Ok(())
    }
}

/// The alarm's rows with as many on both sides.
fn close_up(alarm: &ExplainedAlarm, rows: usize) -> Range<usize> {
    let room = alarm.rows.len().max(CLOSE_UP_ROWS_MIN);
    alarm.rows.start.saturating_sub(room)..(alarm.rows.end + room).min(rows)
}
