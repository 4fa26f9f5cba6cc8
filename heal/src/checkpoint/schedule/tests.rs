use theriac_model::risk::{Abstain, Chance, Horizon, LeadTime, RiskVersion};

use super::*;

const MTBF: f64 = 3_600.0;
const COST: f64 = 3.0;

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value)
}

fn limits() -> Limits {
    Limits {
        min_gap: Duration::from_secs(1),
        max_gap: Duration::from_hours(10),
        expected_mtbf: seconds(MTBF),
        expected_cost: seconds(COST),
        ..Limits::default()
    }
}

/// With a checkpoint and running at time zero.
fn running(limits: Limits) -> Schedule {
    let mut schedule = Schedule::new(limits).unwrap();
    schedule.found(Duration::ZERO);
    schedule.runs(Duration::ZERO);
    schedule
}

fn ample() -> Room {
    Room {
        free_bytes: 1 << 40,
        needed_bytes: 1 << 20,
        reserve_bytes: 1 << 24,
        io_full: Some(0.0),
    }
}

fn risks(probability: f64, lead_s: Option<f64>, resource: &'static str) -> Vec<Risk> {
    Horizon::DEFAULT
        .iter()
        .map(|horizon| Risk {
            horizon: *horizon,
            chance: Ok(Chance::new(probability, probability, probability)),
            lead: lead_s.map(|expected| LeadTime {
                low: 0.0,
                expected,
                high: None,
            }),
            resource: Some(resource),
            model: RiskVersion::linear(),
        })
        .collect()
}

fn waits_until(schedule: &mut Schedule, now: f64) -> f64 {
    match schedule.decide(seconds(now), &ample()) {
        Verdict::Wait { until } => until.as_secs_f64(),
        other => panic!("{other:?}"),
    }
}

fn is_due(schedule: &mut Schedule, now: f64) -> bool {
    schedule.decide(seconds(now), &ample()) == Verdict::Take(Why::Due)
}

#[test]
fn cold_start_is_young_and_daly() {
    let mut schedule = running(limits());
    let interval = (2.0 * COST * MTBF).sqrt();
    assert!((waits_until(&mut schedule, 0.0) - interval).abs() < 0.1);
    // The same whether asked often or seldom.
    for step in 1..146 {
        let until = waits_until(&mut schedule, f64::from(step));
        assert!((until - interval).abs() < 3.0, "{until} at {step}");
    }
    let until = waits_until(&mut schedule, 146.0);
    assert!(is_due(&mut schedule, until + 0.01));
}

#[test]
fn without_any_checkpoint_the_first_is_due_at_once_and_only_while_it_runs() {
    let mut schedule = Schedule::new(limits()).unwrap();
    assert!(matches!(
        schedule.decide(seconds(9.0), &ample()),
        Verdict::Wait { .. }
    ));
    schedule.runs(seconds(9.0));
    assert_eq!(schedule.decide(seconds(9.0), &ample()), Verdict::Take(Why::First));
}

#[test]
fn a_predictor_of_measured_recall_stretches_the_interval_and_one_without_record_does_not() {
    let mut schedule = running(limits());
    let calm = risks(1e-9, None, "memory");
    schedule.hear(Duration::ZERO, &calm);
    let interval = schedule.young_daly_s();
    assert!((waits_until(&mut schedule, 0.0) - interval).abs() < 0.1);
    for failure in 0..20 {
        schedule.learned.trust.failed(failure % 10 < 7);
    }
    let low = schedule.learned.trust.recall_low();
    assert!((0.5..0.6).contains(&low));
    let stretched = interval / (1.0 - low).sqrt();
    assert!((waits_until(&mut schedule, 0.0) - stretched).abs() < 0.1);
    // One that abstains foretells nothing now, whatever it did before.
    let abstains: Vec<Risk> = calm
        .into_iter()
        .map(|risk| Risk {
            chance: Err(Abstain::TooShort),
            ..risk
        })
        .collect();
    schedule.hear(Duration::ZERO, &abstains);
    assert!((waits_until(&mut schedule, 0.0) - interval).abs() < 0.1);
}

#[test]
fn a_high_risk_is_answered_at_once_and_once() {
    let mut schedule = running(limits());
    schedule.hear(seconds(100.0), &risks(0.9, Some(40.0), "memory"));
    let verdict = schedule.decide(seconds(100.0), &ample());
    let Verdict::Take(Why::Risk {
        probability,
        resource,
    }) = verdict
    else {
        panic!("{verdict:?}");
    };
    // A claim of 0.9 within the minute, believed by half before any record.
    assert!((probability - (1.0 - 0.1_f64.sqrt())).abs() < 1e-9 && resource == Some("memory"));
    schedule.took(seconds(103.0), seconds(3.0), false);
    schedule.hear(seconds(106.0), &risks(0.9, Some(34.0), "memory"));
    let again = waits_until(&mut schedule, 106.0);
    assert!(
        (115.0..160.0).contains(&again),
        "the integral runs faster: {again}"
    );
}

#[test]
fn a_failure_that_comes_before_a_checkpoint_is_done_is_not_raced() {
    let mut schedule = running(limits());
    schedule.hear(seconds(100.0), &risks(0.9, Some(2.0), "memory"));
    assert!(!matches!(
        schedule.decide(seconds(100.0), &ample()),
        Verdict::Take(Why::Risk { .. })
    ));
}

#[test]
fn gaps_and_budget_bound_every_interval() {
    let mut frequent = running(Limits {
        min_gap: seconds(60.0),
        budget_pct: 1.0,
        expected_mtbf: seconds(1.0),
        ..limits()
    });
    // 3 s in a hundredth of the time: 297 s of work for each.
    assert!((waits_until(&mut frequent, 0.0) - 297.0).abs() < 0.1);
    let mut seldom = running(Limits {
        max_gap: seconds(90.0),
        ..limits()
    });
    assert_eq!(
        seldom.decide(seconds(90.0), &ample()),
        Verdict::Take(Why::LongestGap)
    );
    let mut pressed = running(Limits {
        min_gap: seconds(60.0),
        ..limits()
    });
    pressed.hear(seconds(59.0), &risks(1.0, None, "memory"));
    assert!(matches!(
        pressed.decide(seconds(59.0), &ample()),
        Verdict::Wait { .. }
    ));
    assert!(matches!(
        pressed.decide(seconds(60.0), &ample()),
        Verdict::Take(Why::Risk { .. })
    ));
}

#[test]
fn a_copy_that_would_fill_the_disk_is_refused() {
    let mut schedule = running(limits());
    let tight = Room {
        free_bytes: (1 << 24) + (1 << 20) - 1,
        ..ample()
    };
    schedule.hear(seconds(200.0), &risks(0.9, None, "disk"));
    let refused = schedule.decide(seconds(200.0), &tight);
    assert!(
        matches!(refused, Verdict::Skip(Refusal::DiskNearlyFull { .. })),
        "{refused:?}"
    );
    let some = Room {
        free_bytes: 50 << 20,
        ..ample()
    };
    assert_eq!(
        schedule.decide(seconds(200.0), &some),
        Verdict::Skip(Refusal::WouldFillTheDisk)
    );
    assert!(matches!(
        schedule.decide(seconds(200.0), &ample()),
        Verdict::Take(_)
    ));
}

#[test]
fn a_saturated_disk_waits_but_not_for_ever_and_not_before_a_failure() {
    let mut schedule = running(Limits {
        max_gap: seconds(300.0),
        ..limits()
    });
    let busy = Room {
        io_full: Some(0.7),
        ..ample()
    };
    assert!(matches!(
        schedule.decide(seconds(300.0), &busy),
        Verdict::Skip(Refusal::Saturated { .. })
    ));
    assert!(matches!(
        schedule.decide(seconds(600.0), &busy),
        Verdict::Take(Why::LongestGap)
    ));
    let mut urgent = running(limits());
    urgent.hear(seconds(100.0), &risks(0.9, None, "memory"));
    assert!(matches!(
        urgent.decide(seconds(100.0), &busy),
        Verdict::Take(Why::Risk { .. })
    ));
}

#[test]
fn attempts_that_come_to_nothing_are_spaced() {
    let mut schedule = running(limits());
    let mut now = 200.0;
    for wait in [5.0, 10.0, 20.0] {
        assert!(is_due(&mut schedule, now));
        schedule.came_to_nothing(seconds(now), seconds(1.0));
        assert_eq!(
            schedule.decide(seconds(now), &ample()),
            Verdict::Skip(Refusal::BackingOff {
                until: seconds(now + wait)
            })
        );
        now += wait;
    }
    assert!(is_due(&mut schedule, now));
}

#[test]
fn a_failure_is_counted_once_and_shortens_the_mean_time_between_them() {
    let mut schedule = running(limits());
    let before = schedule.mtbf_s();
    schedule.failed(seconds(60.0));
    let once = schedule.learned().clone();
    assert!(schedule.mtbf_s() < before);
    schedule.failed(seconds(61.0));
    assert_eq!(*schedule.learned(), once);
    assert!(schedule.unprotected_s() <= 0.0);
}

#[test]
fn cost_is_learnt_and_what_was_learnt_survives_its_file() {
    let mut schedule = running(limits());
    schedule.took(seconds(200.0), seconds(10.0), true);
    assert!((schedule.cost_s() - 10.0).abs() < 1e-9 && (schedule.unprotected_s() - 10.0).abs() < 1e-9);
    schedule.took(seconds(400.0), seconds(20.0), true);
    assert!((schedule.cost_s() - 12.0).abs() < 1e-9);
    schedule.failed(seconds(500.0));
    let text = serde_json::to_string(schedule.learned()).unwrap();
    let again = Schedule::restore(limits(), serde_json::from_str(&text).unwrap()).unwrap();
    assert!((again.cost_s() - schedule.cost_s()).abs() < 1e-9);
    assert!((again.mtbf_s() - schedule.mtbf_s()).abs() < 1e-6);
}

#[test]
fn what_a_file_says_wrongly_is_left_out() {
    let learned = Learned {
        cost_s: Some(f64::NAN),
        worked_s: -1.0,
        failures: 0.0,
        trust: Trust::default(),
        account: Account::default(),
    };
    let schedule = Schedule::restore(limits(), learned).unwrap();
    assert!((schedule.cost_s() - COST).abs() < 1e-9 && (schedule.mtbf_s() - MTBF).abs() < 1e-9);
}

#[test]
fn limits_that_make_no_schedule_are_refused() {
    let crossed = Limits {
        min_gap: seconds(10.0),
        max_gap: seconds(9.0),
        ..limits()
    };
    assert!(matches!(Schedule::new(crossed), Err(LimitsError::Gaps { .. })));
    for budget_pct in [0.0, -1.0, 101.0, f64::NAN] {
        let wrong = Limits {
            budget_pct,
            ..limits()
        };
        assert!(matches!(Schedule::new(wrong), Err(LimitsError::Budget { .. })));
    }
    let nothing = Limits {
        expected_mtbf: Duration::ZERO,
        ..limits()
    };
    assert!(matches!(Schedule::new(nothing), Err(LimitsError::Nothing { .. })));
}

#[test]
fn a_clock_that_runs_backwards_stands_still() {
    let mut schedule = running(limits());
    schedule.hear(seconds(100.0), &[]);
    let before = schedule.unprotected_s();
    schedule.hear(seconds(10.0), &[]);
    assert!((schedule.unprotected_s() - before).abs() < 1e-9);
}

#[test]
fn a_warning_that_never_ends_is_a_false_one_each_time_it_outlives_its_horizon() {
    let mut schedule = running(limits());
    for minute in 0..120 {
        schedule.hear(seconds(60.0 * f64::from(minute)), &risks(0.5, None, "memory"));
    }
    assert!(schedule.learned().trust.calibration() < 0.05);
}
