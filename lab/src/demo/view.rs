//! What a person sees while the demo runs: a live view on a terminal, plain lines with times elsewhere.

use std::io::{self, IsTerminal as _, Stderr, Write};

use ratatui::Terminal;
use ratatui::TerminalOptions;
use ratatui::Viewport;
use ratatui::backend::CrosstermBackend;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, LineGauge, Paragraph, Row, Table, Widget};

use super::record::{EdgeRecord, Record, ScorePoint};
use super::report::markup::{bytes, counted};

/// What the demo does at this moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now<'a> {
    /// Seconds since it began.
    pub(crate) at_s: f64,
    /// Seconds that it will take, about.
    pub(crate) planned_s: f64,
    /// What it does or waits for, in words.
    pub(crate) doing: &'a str,
}

/// The one place that draws. Results go to standard output; all of this goes to standard error.
pub(crate) enum View {
    /// A terminal.
    Live(Box<Terminal<CrosstermBackend<Stderr>>>),
    /// A file, a pipe, or a terminal that cannot say where its cursor is.
    Plain(Box<dyn Write + Send>),
}

impl View {
    /// Opens the live view where there is a terminal and `plain` is not asked for.
    pub(crate) fn open(plain: bool, edges: usize) -> Self {
        let live = || -> io::Result<Self> {
            let lines = u16::try_from(edges)
                .unwrap_or(u16::MAX)
                .saturating_add(FRAME_LINES);
            // The terminal stays in its ordinary mode, so that Ctrl-C is the signal that it always is.
            let options = TerminalOptions {
                viewport: Viewport::Inline(lines),
            };
            let terminal = Terminal::with_options(CrosstermBackend::new(io::stderr()), options)?;
            Ok(Self::Live(Box::new(terminal)))
        };
        if !plain && io::stdout().is_terminal() && io::stderr().is_terminal() {
            live().unwrap_or_else(|_| Self::Plain(Box::new(io::stderr())))
        } else {
            Self::Plain(Box::new(io::stderr()))
        }
    }

    /// Says something that stays on the screen, with its time.
    pub(crate) fn say(&mut self, at_s: f64, text: &str) {
        // A closed terminal must not end the demo: the processes still have to be stopped and the report written.
        let told = match self {
            Self::Live(terminal) => terminal.insert_before(1, |buffer| {
                let line = Line::from(vec![format!("{at_s:6.1} s  ").dim(), Span::raw(text)]);
                line.render(buffer.area, buffer);
            }),
            Self::Plain(writer) => writeln!(writer, "{at_s:6.1} s  {text}"),
        };
        drop(told);
    }

    /// Draws the present state; does nothing where there is no terminal.
    pub(crate) fn draw(&mut self, record: &Record, now: Now<'_>) {
        if let Self::Live(terminal) = self {
            let drawn =
                terminal.draw(|frame| Screen { record, now }.render(frame.area(), frame.buffer_mut()));
            drop(drawn);
        }
    }

    /// Takes the live view off the screen, so that the results follow the lines that stay.
    pub(crate) fn close(self) {
        if let Self::Live(mut terminal) = self {
            drop(terminal.clear());
            drop(terminal.show_cursor());
        }
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Live(_) => "View::Live",
            Self::Plain(_) => "View::Plain",
        })
    }
}

/// Lines of the live view beside one for each edge.
const FRAME_LINES: u16 = 6;

struct Screen<'a> {
    record: &'a Record,
    now: Now<'a>,
}

impl Widget for Screen<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let [_, title, numbers, _, table] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Min(1),
        ])
        .areas(area);
        let [gauge, doing] = Layout::horizontal([Constraint::Length(38), Constraint::Min(10)])
            .spacing(2)
            .areas(title);
        let share = (self.now.at_s / self.now.planned_s.max(1.0)).clamp(0.0, 1.0);
        LineGauge::default()
            .ratio(share)
            .label(format!(
                "{:3.0} s of about {:.0} s",
                self.now.at_s, self.now.planned_s
            ))
            .filled_style(Style::new().fg(Color::Cyan))
            .render(gauge, buffer);
        Line::from(self.now.doing.bold()).render(doing, buffer);
        Paragraph::new(self.numbers()).render(numbers, buffer);
        self.table(table.width).render(table, buffer);
    }
}

impl Screen<'_> {
    fn numbers(&self) -> Line<'static> {
        let record = self.record;
        let published = record.rounds_published();
        let (_, refused) = record.refusals();
        let healed = record.faults.iter().filter(|fault| fault.is_healed()).count();
        Line::from(vec![
            format!("{} published", counted(published, "round")).into(),
            format!(", {} aborted", record.rounds.len() as u64 - published).dim(),
            format!("   model {}", record.model_version).into(),
            format!("   hostile refused {refused}×").magenta(),
            format!("   faults healed {healed} of {}", record.faults.len()).green(),
            format!(
                "   {} up, {} down",
                bytes(record.bytes_up),
                bytes(record.bytes_down)
            )
            .dim(),
        ])
    }

    fn table(&self, width: u16) -> Table<'_> {
        const FIXED: [u16; 7] = [12, 14, 11, 7, 14, 5, 8];
        let spark = width.saturating_sub(FIXED.iter().sum::<u16>() + 8).clamp(8, 60);
        let header = [
            "edge", "state", "network", "score", "", "ε spent", "model", "restarts",
        ];
        let header = Row::new(header.map(|name| Cell::from(name.dim())));
        let rows = self.record.edges.iter().map(|edge| row(edge, usize::from(spark)));
        let widths = [
            FIXED[0], FIXED[1], FIXED[2], FIXED[3], spark, FIXED[4], FIXED[5], FIXED[6],
        ];
        Table::new(rows, widths.map(Constraint::Length))
            .header(header)
            .column_spacing(1)
    }
}

fn row(edge: &EdgeRecord, spark: usize) -> Row<'static> {
    let name = if edge.hostile {
        edge.name.clone().magenta()
    } else {
        edge.name.clone().into()
    };
    let latest = edge.scores.last().copied();
    let (score, over) = latest.map_or_else(
        || (String::new(), false),
        |point| {
            (
                format!("{:5.2}×", times_threshold(point)),
                times_threshold(point) >= 1.0,
            )
        },
    );
    let score = if over { score.red().bold() } else { score.into() };
    let spent = format!("{:.2} of {}", edge.epsilon, edge.epsilon_limit);
    let spent = if edge.budget_spent_s.is_some() {
        spent.yellow()
    } else {
        spent.into()
    };
    Row::new(vec![
        Cell::from(name),
        Cell::from(state(edge)),
        Cell::from(edge.federation.clone()),
        Cell::from(score),
        Cell::from(sparkline(&edge.scores, spark)),
        Cell::from(spent),
        Cell::from(edge.model_version.to_string()),
        Cell::from(edge.restarts.to_string()),
    ])
}

fn state(edge: &EdgeRecord) -> Span<'static> {
    let (seen, needed) = edge.warm_up;
    if edge.service != "running" && !edge.service.is_empty() {
        format!("service {}", edge.service).red()
    } else if edge.hostile && edge.scores.len() > 1 {
        "lying".magenta()
    } else if edge.scores.is_empty() && needed > 0 {
        format!(
            "learning {:.0} %",
            (seen as f64 / needed as f64 * 100.0).min(100.0)
        )
        .dim()
    } else {
        Span::raw(edge.phase.clone())
    }
}

/// The latest scores as bars, the newest at the right; full height is four thresholds, red is above one.
fn sparkline(scores: &[ScorePoint], width: usize) -> Line<'static> {
    let bars = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let recent = &scores[scores.len().saturating_sub(width)..];
    let spans = recent.iter().map(|point| {
        let times = times_threshold(*point);
        // Half the height is the threshold itself; a square root keeps small ripples visible.
        let share = (times.clamp(0.0, 4.0) / 4.0).sqrt();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of seven steps"
        )]
        let bar = bars[(share * 7.0).round() as usize];
        let style = if times >= 1.0 {
            Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
        } else {
            Style::new().fg(Color::Cyan)
        };
        Span::styled(bar.to_string(), style)
    });
    let pad = Span::raw(" ".repeat(width - recent.len()));
    std::iter::once(pad).chain(spans).collect()
}

fn times_threshold(point: ScorePoint) -> f32 {
    let ratio = point.score / point.threshold;
    if ratio.is_finite() { ratio } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::record::tests::specimen;

    fn drawn(record: &Record, width: u16) -> String {
        let area = Rect::new(0, 0, width, FRAME_LINES + 5);
        let mut buffer = Buffer::empty(area);
        let now = Now {
            at_s: 61.0,
            planned_s: 110.0,
            doing: "waiting until site-c has healed the memory leak",
        };
        Screen { record, now }.render(area, &mut buffer);
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..area.height)
            .map(|y| line(y).trim_end().to_owned() + "\n")
            .collect()
    }

    #[test]
    fn shows_every_edge_with_its_state_score_and_budget() {
        let screen = drawn(&specimen(), 120);
        for name in ["site-a", "site-b", "site-c", "site-<d>", "site-e"] {
            assert!(screen.contains(name), "{name} is missing:\n{screen}");
        }
        for part in [
            "61 s of about 110 s",
            "waiting until site-c",
            "30 rounds published",
            "lying",
            "3.42 of 8",
            "×",
        ] {
            assert!(screen.contains(part), "{part} is missing:\n{screen}");
        }
    }

    #[test]
    fn fits_a_narrow_terminal_and_an_empty_record() {
        drawn(&specimen(), 40);
        drawn(&Record::default(), 20);
    }

    #[test]
    fn a_score_above_the_threshold_stands_out() {
        let point = |score| ScorePoint {
            at_s: 0.0,
            score,
            threshold: 1.0,
        };
        let line = sparkline(&[point(0.1), point(8.0)], 4);
        let text: String = line.spans.iter().map(|span| span.content.as_ref()).collect();
        assert_eq!(text, "  ▂█");
        assert_eq!(line.spans[2].style.fg, Some(Color::Red));
    }
}
