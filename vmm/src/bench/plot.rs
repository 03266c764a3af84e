//! Results as pictures: SVG, without anything of the system's (no font is looked at or embedded: viewers have their own).

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

/// One line of a chart.
#[derive(Debug, Clone)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// Ascending by the first.
    pub points: Vec<(f64, f64)>,
}

/// One chart.
#[derive(Debug, Clone)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below it.
    pub across: String,
    /// At its side.
    pub up: String,
    /// What it shows.
    pub series: Vec<Series>,
    /// Moments to be marked by a line from the bottom to the top: where, and what is to be said of them.
    pub marks: Vec<(f64, String)>,
}

/// Bars of one group, by name.
#[derive(Debug, Clone)]
pub struct Group {
    /// Below it.
    pub name: String,
    /// Name and value, in the same order in each group; none is left out.
    pub bars: Vec<(String, Option<f64>)>,
}

/// A picture that could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the plot: {0}")]
pub struct PlotError(String);

/// Okabe and Ito's colours, which everyone can tell apart (*Color Universal Design*, 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
const WIDTH: u32 = 1100;
/// At the right of a chart, where the legend hides no line.
const LEGEND_WIDTH: u32 = 180;
const LEGEND_ROW: i32 = 20;
const HEIGHT: u32 = 340;
const MARK: RGBColor = RGBColor(120, 120, 120);
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn colour(index: usize) -> RGBColor {
    COLOURS.get(index % COLOURS.len()).copied().unwrap_or(BLACK)
}

fn failed(error: impl std::fmt::Display) -> PlotError {
    PlotError(error.to_string())
}

/// Charts one below the other.
///
/// # Errors
/// [`PlotError`].
pub fn charts(charts: &[Chart]) -> Result<String, PlotError> {
    let rows = u32::try_from(charts.len().max(1)).unwrap_or(1);
    draw(HEIGHT.saturating_mul(rows), |area| {
        area.split_evenly((charts.len().max(1), 1)).iter().zip(charts).try_for_each(|(area, chart)| one(area, chart))
    })
}

fn draw(height: u32, paint: impl FnOnce(&Area<'_>) -> Result<(), PlotError>) -> Result<String, PlotError> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    paint(&area)?;
    area.present().map_err(failed)?;
    drop(area);
    Ok(svg)
}

/// From the least to the greatest, and never empty.
fn extent(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, most) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |all, value| (all.0.min(value), all.1.max(value)));
    match least < most {
        true => least..most,
        false if least.is_finite() => least - 1.0..least + 1.0,
        false => 0.0..1.0,
    }
}

fn one<'a>(area: &Area<'a>, chart: &Chart) -> Result<(), PlotError> {
    let points = || chart.series.iter().flat_map(|series| series.points.iter().copied());
    let marks = chart.marks.iter().map(|(x, _)| *x);
    let (across, up) = (extent(points().map(|(x, _)| x).chain(marks)), extent(points().map(|(_, y)| y).chain([0.0])));
    let up = up.start..up.end + (up.end - up.start) * 0.05;
    let (area, beside) = area.split_horizontally(area.dim_in_pixel().0.saturating_sub(LEGEND_WIDTH));
    let mut context = ChartBuilder::on(&area)
        .caption(&chart.title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(72)
        .build_cartesian_2d(across, up.clone())
        .map_err(failed)?;
    context.configure_mesh().x_desc(&chart.across).y_desc(&chart.up).light_line_style(WHITE).draw().map_err(failed)?;
    for (index, series) in chart.series.iter().enumerate() {
        let style = colour(index).stroke_width(2);
        context.draw_series(LineSeries::new(series.points.iter().copied(), style)).map_err(failed)?;
    }
    for (x, _) in &chart.marks {
        let style = MARK.stroke_width(1);
        let line = DashedLineSeries::new([(*x, up.start), (*x, up.end)], 6, 4, style);
        context.draw_series(line).map_err(failed)?;
    }
    legend_beside(&beside, chart)
}

/// A row for each series and each mark.
fn legend_beside(area: &Area<'_>, chart: &Chart) -> Result<(), PlotError> {
    let series = chart.series.iter().enumerate().map(|(index, series)| (&series.name, colour(index).stroke_width(2)));
    let marks = chart.marks.iter().map(|(_, name)| (name, MARK.stroke_width(1)));
    for (y, (name, style)) in (1..).map(|row| row * LEGEND_ROW + LEGEND_ROW).zip(series.chain(marks)) {
        area.draw(&PathElement::new([(4, y), (24, y)], style)).map_err(failed)?;
        area.draw(&Text::new(name.clone(), (30, y - 6), ("sans-serif", 13))).map_err(failed)?;
    }
    Ok(())
}

fn legend<'a, X, Y>(context: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>) -> Result<(), PlotError>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    let position = SeriesLabelPosition::UpperRight;
    let labels = &mut context.configure_series_labels();
    labels.position(position).background_style(WHITE.mix(0.8)).border_style(BLACK).draw().map_err(failed)
}

/// Groups of bars, on a logarithmic scale.
///
/// # Errors
/// [`PlotError`].
pub fn bars(title: &str, unit: &str, groups: &[Group]) -> Result<String, PlotError> {
    let values =
        || groups.iter().flat_map(|group| &group.bars).filter_map(|(_, value)| *value).filter(|value| *value > 0.0);
    let values = extent(values());
    let up = (values.start.max(1.0) / 2.0..values.end.max(2.0) * 4.0).log_scale();
    let across = -0.5..groups.len().max(1) as f64 - 0.5;
    draw(HEIGHT + HEIGHT / 2, |area| {
        let mut context = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(72)
            .build_cartesian_2d(across, up)
            .map_err(failed)?;
        let name = |at: &f64| {
            let near = (at - at.round()).abs() < 0.01 && *at > -0.1;
            groups
                .get(at.round().max(0.0) as usize)
                .filter(|_| near)
                .map(|group| group.name.clone())
                .unwrap_or_default()
        };
        let mut mesh = context.configure_mesh();
        mesh.disable_x_mesh()
            .x_labels(groups.len() * 2 + 1)
            .x_label_formatter(&name)
            .y_desc(unit)
            .draw()
            .map_err(failed)?;
        let most = groups.iter().map(|group| group.bars.len()).max().unwrap_or(0);
        let width = 0.8 / most.max(1) as f64;
        for index in 0..most {
            let bar = |(at, group): (usize, &Group)| {
                let value = group.bars.get(index)?.1?;
                let left = at as f64 - 0.4 + index as f64 * width;
                Some(Rectangle::new([(left, f64::MIN_POSITIVE), (left + width * 0.9, value)], colour(index).filled()))
            };
            let bars: Vec<_> = groups.iter().enumerate().filter_map(bar).collect();
            let label = groups.iter().find_map(|group| group.bars.get(index)).map_or("", |(name, _)| name.as_str());
            let drawn = context.draw_series(bars).map_err(failed)?.label(label);
            drawn.legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour(index).filled()));
        }
        legend(&mut context)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.to_owned(), points: points.to_vec() }
    }

    #[test]
    fn a_chart_has_its_words_and_a_line_for_each_series() {
        let chart = Chart {
            title: "residence".to_owned(),
            across: "seconds".to_owned(),
            up: "MRR".to_owned(),
            series: vec![
                series("in place", &[(0.0, 25.0), (1.0, 25.0)]),
                series("cold & bare", &[(0.0, 100.0), (1.0, 30.0)]),
            ],
            marks: vec![(0.5, "the outage".to_owned())],
        };
        let svg = charts(&[chart.clone(), chart]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for word in ["residence", "seconds", "MRR", "in place", "cold &amp; bare", "the outage"] {
            assert_eq!(svg.matches(word).count(), 2, "{word}");
        }
        assert!(svg.contains("#0072B2") && svg.contains("#D55E00"), "{svg}");
    }

    #[test]
    fn charts_without_points_or_with_one_value_can_be_drawn() {
        for points in [&[][..], &[(0.0, 0.0)], &[(1.0, f64::NAN), (2.0, f64::INFINITY)]] {
            let empty = || String::new();
            let series = vec![series("a", points)];
            let chart = Chart { title: empty(), across: empty(), up: empty(), series, marks: Vec::new() };
            assert!(charts(&[chart]).is_ok());
        }
        assert!(charts(&[]).is_ok() && bars("", "", &[]).is_ok());
    }

    #[test]
    fn bars_that_are_absent_leave_a_gap() {
        let group = |name: &str, second| Group {
            name: name.to_owned(),
            bars: vec![("kernel swap".to_owned(), Some(1e4)), ("perdure".to_owned(), second)],
        };
        let svg = bars("pages a second", "pages/s", &[group("zipf", None), group("uniform", Some(2e5))]).unwrap();
        let of = |colour: &str| svg.matches(&format!("fill=\"{colour}\"")).count();
        // One for the legend each.
        assert_eq!((of("#0072B2"), of("#D55E00")), (3, 2), "{svg}");
        assert!(svg.contains("uniform") && svg.contains("zipf"));
    }
}
