//! The list beside the panels: the highest alarms, each with its ranked causes.

use plotters::prelude::*;
use theriac_model::causes::ChannelCause;

use super::super::explain::{leading, percent};
use super::{ALARM, ALARMS_MAX, Area, Drawn, GRID, INK, METRIC, PALE_INK, View};

const LEFT: i32 = 18;
const BAR_WIDTH: i32 = 300;
const CAUSE_HEIGHT: i32 = 34;
const ALARM_HEIGHT: i32 = 52;
/// Most causes of one alarm.
const CAUSES_MAX: usize = 4;
/// Characters of a name that fit.
const NAME_MAX: usize = 30;

pub(super) fn draw(view: &View, area: &Area) -> Drawn {
    let heading = ("sans-serif", 15).into_font().style(FontStyle::Bold).color(&INK);
    area.draw(&Text::new("causes of the highest alarms", (LEFT, 4), heading))?;
    let alarms = view.by_score();
    if alarms.is_empty() {
        let words = "no alarm: the metrics shown are those that surprised most";
        return area.draw(&Text::new(words, (LEFT, 30), pale(14)));
    }
    let bottom = i32::try_from(area.dim_in_pixel().1).unwrap_or(0) - 20;
    let mut y = 30;
    let mut shown = 0;
    for (number, alarm) in alarms.iter().take(ALARMS_MAX) {
        let causes: Vec<&ChannelCause> = leading(&alarm.causes).take(CAUSES_MAX).collect();
        let height = ALARM_HEIGHT + CAUSE_HEIGHT * i32::try_from(causes.len()).unwrap_or(0);
        if y + height > bottom && shown > 0 {
            break;
        }
        let clock = &view.clock;
        let when = format!(
            "{}   {}, {}",
            number + 1,
            clock.words(alarm.rows.start),
            clock.duration(alarm.rows.start, alarm.rows.end)
        );
        let style = ("sans-serif", 15)
            .into_font()
            .style(FontStyle::Bold)
            .color(&ALARM);
        area.draw(&Text::new(when, (LEFT, y), style))?;
        let level = view.explained.levels[alarm.rows.start];
        let words = format!("score up to {:.1}, threshold {level:.1}", alarm.score);
        area.draw(&Text::new(words, (LEFT, y + 19), pale(13)))?;
        y += 40;
        let strongest = causes.first().map_or(0.0, |cause| cause.strength);
        for cause in causes {
            // Strengths are logarithms.
            bar(view, area, y, cause, (cause.strength - strongest).exp())?;
            y += CAUSE_HEIGHT;
        }
        y += ALARM_HEIGHT - 40;
        shown += 1;
    }
    if alarms.len() > shown {
        let words = format!("and {} lower alarms", alarms.len() - shown);
        area.draw(&Text::new(words, (LEFT, y.min(bottom)), pale(13)))?;
    }
    Ok(())
}

fn bar(view: &View, area: &Area, y: i32, cause: &ChannelCause, share: f32) -> Drawn {
    let name: String = view.detector.schema().features[cause.channel]
        .name
        .chars()
        .take(NAME_MAX)
        .collect();
    area.draw(&Text::new(name, (LEFT, y), ink(14)))?;
    let right = pale(13).pos(plotters::style::text_anchor::Pos::new(
        plotters::style::text_anchor::HPos::Right,
        plotters::style::text_anchor::VPos::Top,
    ));
    area.draw(&Text::new(evidence(cause), (LEFT + BAR_WIDTH, y + 1), right))?;
    let full = [(LEFT, y + 18), (LEFT + BAR_WIDTH, y + 23)];
    area.draw(&Rectangle::new(full, GRID.filled()))?;
    #[expect(clippy::cast_possible_truncation, reason = "a pixel")]
    let width = (share.clamp(0.0, 1.0) * BAR_WIDTH as f32).round() as i32;
    let part = [(LEFT, y + 18), (LEFT + width, y + 23)];
    area.draw(&Rectangle::new(part, METRIC.filled()))
}

/// How far the metric was from usual, and its share of the surprise.
fn evidence(cause: &ChannelCause) -> String {
    let arrow = if cause.change >= 0.0 { '▲' } else { '▼' };
    format!(
        "{arrow} {:.1} spreads · {} of residual",
        cause.change.abs(),
        percent(cause.residual_share)
    )
}

fn ink(size: u32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&INK)
}

fn pale(size: u32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&PALE_INK)
}
