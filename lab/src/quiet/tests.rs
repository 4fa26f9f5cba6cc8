//! The measurement measures: it finds actions where something calls for them, and none where nothing does.

use super::*;
use theriac_model::series::Series;

fn args() -> Args {
    Args {
        data: PathBuf::from("."),
        step: Duration::from_mins(1),
        memory: Vec::new(),
        cpu: Vec::new(),
        limit: 1.0,
        processors: 1.0,
        queueing: false,
        refit_rows: 1_440,
        lasting: Duration::from_secs(10),
        format: Format::Human,
    }
}

/// Three channels over two days of minutes with a seeded flicker; the first stands at the level `high` for 20 min of the second day.
fn recorded(step_at: Option<usize>, high: f32) -> Series {
    let mut noise = 7_u64;
    let mut flicker = || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        (noise % 1_000) as f32 / 20_000.0
    };
    let values = (0..2_880)
        .flat_map(|row| {
            let up = step_at.is_some_and(|at| (at..at + 20).contains(&row));
            let level = if up { high } else { 0.3 };
            [level + flicker(), 0.4 + flicker(), 0.5 + flicker()]
        })
        .collect();
    Series::new(3, values).unwrap()
}

fn replayed(args: &Args, series: &Series) -> Machine {
    let schema = schema(args, series.channels()).unwrap();
    replay::replay("made", series, schema, args).unwrap()
}

#[test]
fn a_level_that_lasts_is_acted_on_where_its_channel_is_the_services_and_nowhere_else() {
    let (calm, stepped) = (recorded(None, 0.9), recorded(Some(2_000), 0.92));
    let quiet = replayed(&args(), &calm);
    assert!(quiet.actions() == 0 && quiet.days > 1.0, "{quiet:?}");
    let blamed = replayed(&args(), &stepped);
    assert!(blamed.restarts_for_memory > 0 && blamed.alarms > 0, "{blamed:?}");
    let cpu = Args {
        cpu: vec![0],
        ..args()
    };
    let as_fast_as_ever = replayed(&cpu, &stepped);
    assert!(
        as_fast_as_ever.actions() == 0 && as_fast_as_ever.incidents > 0,
        "{as_fast_as_ever:?}"
    );
    let cpu = Args {
        queueing: true,
        ..cpu
    };
    let blamed = replayed(&cpu, &stepped);
    assert!(
        blamed.restarts_for_cpu > 0 && blamed.restarts_for_memory == 0,
        "{blamed:?}"
    );
    // A level that leaves room, at a tenth of the processors.
    for args in [
        args(),
        Args {
            cpu: vec![0],
            queueing: true,
            limit: 2.0,
            ..args()
        },
    ] {
        let harmless = replayed(&args, &recorded(Some(2_000), 0.45));
        assert!(harmless.actions() == 0 && harmless.incidents > 0, "{harmless:?}");
    }
    let other = Args {
        memory: vec![1],
        ..args()
    };
    let of_host = replayed(&other, &stepped);
    assert!(of_host.actions() == 0 && of_host.alarms > 0, "{of_host:?}");
}

#[test]
fn a_channel_that_is_not_there_and_a_folder_without_recordings_are_told() {
    let wrong = Args {
        memory: vec![3],
        ..args()
    };
    let told = schema(&wrong, 3).unwrap_err().to_string();
    assert!(told.contains("--memory names channel 3 of 3"), "{told}");
    let empty = tempfile::tempdir().unwrap();
    let nothing = Args {
        data: empty.path().to_owned(),
        ..args()
    };
    assert!(matches!(run(&nothing), Err(QuietError::Nothing { .. })));
}
