//! Panels over time: the score with its threshold, and single metrics.

use std::ops::Range;

use plotters::chart::{ChartContext, LabelAreaPosition};
use plotters::coord::cartesian::Cartesian2d;
use plotters::prelude::*;

use super::axis::Axis;
use super::{ALARM, Area, Drawn, GRID, INK, METRIC, PALE_INK, SCORE, TIME_LABELS, USUAL, View};

/// A chart on an area.
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// Room for the labels of values.
const VALUE_LABELS: u32 = 58;
/// A break in a line: so many usual steps without a row.
const BREAK_STEPS: f64 = 5.0;
/// Ticks of the time axis for so many pixels.
const PIXELS_PER_TICK: u32 = 90;

/// Panels over the same rows.
#[derive(Debug)]
pub(super) struct Panel<'a> {
    view: &'a View<'a>,
    rows: Range<usize>,
    /// Whether the panels carry their titles.
    titles: bool,
}

impl<'a> Panel<'a> {
    pub(super) fn new(view: &'a View<'a>, rows: Range<usize>, titles: bool) -> Self {
        Self { view, rows, titles }
    }

    /// Score, threshold and alarms, on a logarithmic scale: a fault's score can be a thousand times the usual one.
    pub(super) fn score(&self, area: &Area, name: &str, last: bool) -> Drawn {
        let explained = self.view.explained;
        let scores: Vec<f64> = explained.scores.iter().map(|s| logarithm(*s)).collect();
        let levels: Vec<f64> = explained.levels.iter().map(|s| logarithm(*s)).collect();
        let both = finite_range(scores.iter().chain(&levels).copied()).unwrap_or(0.0..1.0);
        // Scores far below the usual say nothing.
        let y = Axis::decades(both.start.max(-1.0)..both.end.max(0.5) + 0.1);
        let mut chart = self.chart(area, y, last)?;
        self.shade_alarms(&mut chart)?;
        for line in self.lines(&scores, pixels(area)) {
            chart.draw_series(LineSeries::new(line, SCORE.stroke_width(1)))?;
        }
        for line in self.lines(&levels, pixels(area) / 8) {
            let dashed = DashedLineSeries::new(line, 6, 5, ALARM.stroke_width(2));
            chart.draw_series(dashed)?;
        }
        self.number_alarms(area, &chart)?;
        title(area, if self.titles { "anomaly score" } else { "" }, name)
    }

    /// One metric with its usual range, on the scale that the whole recording needs.
    pub(super) fn metric(&self, area: &Area, channel: usize, last: bool) -> Drawn {
        let channels = self.view.series.channels();
        let column = self.view.series.values().iter().skip(channel).step_by(channels);
        let values: Vec<f64> = column.map(|value| f64::from(*value)).collect();
        let usual = self.view.detector.usual_range(channel);
        let usual = f64::from(usual.start)..f64::from(usual.end);
        let seen = finite_range(values.iter().copied()).unwrap_or(0.0..1.0);
        let y = Axis::plain(seen.start.min(usual.start)..seen.end.max(usual.end), 3);
        let mut chart = self.chart(area, y, last)?;
        let x = self.seconds();
        let band = Rectangle::new(
            [(x.start, usual.start), (x.end, usual.end)],
            USUAL.mix(0.12).filled(),
        );
        chart.draw_series(std::iter::once(band))?;
        self.shade_alarms(&mut chart)?;
        for line in self.lines(&values, pixels(area)) {
            chart.draw_series(LineSeries::new(line, METRIC.stroke_width(1)))?;
        }
        let feature = &self.view.detector.schema().features[channel];
        let name = match feature.unit.as_str() {
            "" | "1" => feature.name.clone(),
            unit => format!("{}, {unit}", feature.name),
        };
        title(area, if self.titles { &name } else { "" }, "")
    }

    fn chart<'x, 'b>(
        &self,
        area: &'x Area<'b>,
        y: Axis,
        last: bool,
    ) -> Result<Chart<'x, 'b>, DrawingAreaErrorKind<std::io::Error>> {
        let ticks = (pixels(area) / PIXELS_PER_TICK).max(2) as usize;
        let x = Axis::time(self.seconds(), ticks, self.view.clock.is_utc());
        let mut chart = ChartBuilder::on(area)
            .margin_top(22)
            .margin_right(14)
            .margin_left(8)
            .set_label_area_size(LabelAreaPosition::Left, VALUE_LABELS)
            .set_label_area_size(LabelAreaPosition::Bottom, if last { TIME_LABELS } else { 6 })
            .build_cartesian_2d(x, y)?;
        let label = |color| ("sans-serif", 14).into_font().color(color);
        let mut mesh = chart.configure_mesh();
        mesh.bold_line_style(GRID)
            .light_line_style(GRID)
            .axis_style(PALE_INK)
            .y_label_style(label(&PALE_INK))
            .x_label_style(label(&PALE_INK))
            .x_labels(ticks + 2)
            .y_labels(12)
            .set_tick_mark_size(LabelAreaPosition::Bottom, if last { 4 } else { 0 });
        if last {
            let description = if self.view.clock.is_utc() {
                "time, UTC"
            } else {
                "time since the first row"
            };
            mesh.x_desc(description)
                .axis_desc_style(label(&PALE_INK))
                .draw()?;
        } else {
            mesh.x_label_formatter(&|_| String::new()).draw()?;
        }
        Ok(chart)
    }

    fn seconds(&self) -> Range<f64> {
        let clock = &self.view.clock;
        clock.seconds(self.rows.start)..clock.seconds(self.rows.end)
    }

    fn shade_alarms(&self, chart: &mut Chart) -> Drawn {
        let x = self.seconds();
        let y = chart.plotting_area().get_y_range();
        // Never thinner than two pixels, or a short alarm in a long recording is not seen.
        let (span, _) = chart.plotting_area().get_pixel_range();
        let least = 2.0 * (x.end - x.start) / f64::from((span.end - span.start).max(1));
        let clock = &self.view.clock;
        let shades = self.view.explained.alarms.iter().filter_map(|alarm| {
            if alarm.rows.end <= self.rows.start || alarm.rows.start >= self.rows.end {
                return None;
            }
            let from = clock.seconds(alarm.rows.start).max(x.start);
            let to = clock.seconds(alarm.rows.end).min(x.end).max(from + least);
            let shade = ALARM.mix(0.16).filled();
            Some(Rectangle::new([(from, y.start), (to, y.end)], shade))
        });
        chart.draw_series(shades)?;
        Ok(())
    }

    /// Numbers the listed alarms at the top of the score, as the list beside it does.
    fn number_alarms(&self, area: &Area, chart: &Chart) -> Drawn {
        let top = chart.plotting_area().get_y_range().end;
        let (left, upper) = area.get_base_pixel();
        let mut placed: Vec<i32> = Vec::new();
        for (number, alarm) in self.view.by_score().into_iter().take(super::ALARMS_MAX) {
            let rows = &alarm.rows;
            let middle = usize::midpoint(rows.start, rows.end);
            if !self.rows.contains(&middle) {
                continue;
            }
            let seconds = self.view.clock.seconds(middle);
            let (x, y) = chart.plotting_area().map_coordinate(&(seconds, top));
            // Where two would lie on each other the higher one stays.
            if placed.iter().any(|other| (x - other).abs() < 18) {
                continue;
            }
            placed.push(x);
            let style = TextStyle::from(("sans-serif", 14).into_font().style(FontStyle::Bold)).color(&ALARM);
            let style = style.pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Center,
                plotters::style::text_anchor::VPos::Top,
            ));
            area.draw(&Text::new(
                (number + 1).to_string(),
                (x - left, y - upper + 3),
                style,
            ))?;
        }
        Ok(())
    }

    /// The values of the shown rows as lines of at most two points a pixel column: its extremes, in the order of time. A
    /// missing value or a gap in time breaks the line.
    fn lines(&self, values: &[f64], columns: u32) -> Vec<Vec<(f64, f64)>> {
        let clock = &self.view.clock;
        let shown = self.rows.start..self.rows.end.min(values.len());
        let per_column = shown.len().div_ceil(columns.max(1) as usize).max(1);
        let usual_step = self.view.detector.options().step.as_secs_f64();
        let mut lines: Vec<Vec<(f64, f64)>> = vec![Vec::new()];
        let mut column: Vec<(f64, f64)> = Vec::new();
        let mut before: Option<f64> = None;
        let flush = |lines: &mut Vec<Vec<(f64, f64)>>, column: &mut Vec<(f64, f64)>| {
            if let Some(line) = lines.last_mut() {
                line.extend(extremes(column));
            }
            column.clear();
        };
        for row in shown {
            let (at, value) = (clock.seconds(row), values[row]);
            let gap = before.is_some_and(|before| at - before > BREAK_STEPS * usual_step);
            if !value.is_finite() || gap {
                flush(&mut lines, &mut column);
                if lines.last().is_some_and(|line| !line.is_empty()) {
                    lines.push(Vec::new());
                }
            }
            if value.is_finite() {
                before = Some(at);
                column.push((at, value));
                if column.len() == per_column {
                    flush(&mut lines, &mut column);
                }
            }
        }
        flush(&mut lines, &mut column);
        lines.retain(|line| !line.is_empty());
        lines
    }
}

/// A name at the upper left and one at the upper right.
fn title(area: &Area, left: &str, right: &str) -> Drawn {
    let bold = ("sans-serif", 15).into_font().style(FontStyle::Bold).color(&INK);
    area.draw(&Text::new(left.to_owned(), (24, 4), bold))?;
    let (width, _) = area.dim_in_pixel();
    let at = (i32::try_from(width).unwrap_or(0) - 16, 4);
    let style = TextStyle::from(("sans-serif", 14).into_font()).color(&PALE_INK);
    let style = style.pos(plotters::style::text_anchor::Pos::new(
        plotters::style::text_anchor::HPos::Right,
        plotters::style::text_anchor::VPos::Top,
    ));
    area.draw(&Text::new(right.to_owned(), at, style))
}

fn extremes(column: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let least = column.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1));
    let greatest = column.iter().enumerate().max_by(|a, b| a.1.1.total_cmp(&b.1.1));
    let (Some((low, _)), Some((high, _))) = (least, greatest) else {
        return Vec::new();
    };
    if low == high {
        return vec![column[low]];
    }
    vec![column[low.min(high)], column[low.max(high)]]
}

fn logarithm(score: f32) -> f64 {
    if score.is_finite() {
        f64::from(score.max(0.01)).log10()
    } else {
        f64::NAN
    }
}

fn finite_range(values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
    let finite = values.filter(|value| value.is_finite());
    finite.fold(None, |range: Option<Range<f64>>, value| match range {
        None => Some(value..value),
        Some(range) => Some(range.start.min(value)..range.end.max(value)),
    })
}

fn pixels(area: &Area) -> u32 {
    area.dim_in_pixel().0
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_column_keeps_its_extremes_in_the_order_of_time() {
        assert_eq!(
            extremes(&[(0.0, 1.0), (1.0, 9.0), (2.0, -3.0), (3.0, 0.0)]),
            [(1.0, 9.0), (2.0, -3.0)]
        );
        assert_eq!(extremes(&[(0.0, 1.0), (1.0, 1.0)]), [(0.0, 1.0), (1.0, 1.0)]);
        assert_eq!(extremes(&[(5.0, 2.0)]), [(5.0, 2.0)]);
        assert!(extremes(&[]).is_empty());
    }
}
