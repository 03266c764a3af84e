//! Holding what a guest printed against what it must have printed.
//!
//! A guest's whole output is a function of its parameters, so that the judgement is a comparison of bytes. Output
//! may come in segments: after a return to an earlier generation a VM prints again, from any byte that it had
//! already printed.

/// Where an output first differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The line that was due there.
    pub(crate) expected: String,
    /// The line that stands there, from its start in this segment.
    pub(crate) found: String,
}

/// What was compared without a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Complete lines up to the furthest byte.
    pub(crate) lines: usize,
    /// The output ends within a line.
    pub(crate) partial: bool,
    /// Nothing more is due.
    pub(crate) complete: bool,
    /// Segments that began before the end of the one before.
    pub(crate) rewound: usize,
}

/// The lines due, made as far as they are needed.
#[derive(Debug)]
pub(crate) struct Transcript<I> {
    source: I,
    text: String,
    ends: Vec<usize>,
    finished: bool,
    reached: Reached,
}

/// How far the segments compared so far go.
#[derive(Debug, Clone, Copy, Default)]
struct Reached {
    segments: usize,
    end: usize,
    furthest: usize,
    rewound: usize,
}

impl<I: Iterator<Item = String>> Transcript<I> {
    /// `source` gives the lines due, without their line feed.
    pub(crate) fn new(source: I) -> Self {
        Self { source, text: String::new(), ends: Vec::new(), finished: false, reached: Reached::default() }
    }

    fn reach(&mut self, length: usize) {
        while self.text.len() < length && !self.finished {
            match self.source.next() {
                Some(line) => {
                    self.text.push_str(&line);
                    self.text.push('\n');
                    self.ends.push(self.text.len());
                }
                None => self.finished = true,
            }
        }
    }

    /// Holds `segments` against what is due: the first from the start, each further one from a byte that the ones
    /// before it had reached.
    pub(crate) fn compare(&mut self, segments: &[&str]) -> Result<Extent, Difference> {
        segments.iter().try_for_each(|segment| self.follow(segment))?;
        Ok(self.extent())
    }

    /// Holds the next segment against what is due.
    pub(crate) fn follow(&mut self, segment: &str) -> Result<(), Difference> {
        let Reached { segments, end, furthest, rewound } = self.reached;
        let start = if segments == 0 { 0 } else { self.locate(segment, end, furthest) };
        self.compare_from(segment, start)?;
        let end = start + segment.len();
        self.reached = Reached {
            segments: segments + 1,
            end,
            furthest: furthest.max(end),
            rewound: rewound + usize::from(start < self.reached.end),
        };
        Ok(())
    }

    /// Holds a segment that is still being printed against what is due: the next one is compared as if this had not been.
    pub(crate) fn preview(&mut self, segment: &str) -> Result<Extent, Difference> {
        let reached = self.reached;
        let extent = self.follow(segment).map(|()| self.extent());
        self.reached = reached;
        extent
    }

    /// How far all segments together go.
    pub(crate) fn extent(&mut self) -> Extent {
        let furthest = self.reached.furthest;
        self.reach(furthest + 1);
        let lines = self.ends.partition_point(|&line_end| line_end <= furthest);
        Extent {
            lines,
            partial: furthest > 0 && self.ends.get(lines.wrapping_sub(1)) != Some(&furthest),
            complete: self.finished && furthest == self.text.len(),
            rewound: self.reached.rewound,
        }
    }

    /// Where `segment` begins: right at `end` if it can, else the last place up to `furthest` where it fits, else
    /// the last place where its first bytes do.
    fn locate(&mut self, segment: &str, end: usize, furthest: usize) -> usize {
        const DISTINCT: usize = 64; // longer than two lines' repeated parts, so that it occurs once
        self.reach(furthest + segment.len() + 1);
        let due = self.text.as_bytes();
        let head = &segment.as_bytes()[..segment.len().min(DISTINCT)];
        let fits = |start: &usize| due.get(*start..).is_some_and(|rest| rest.starts_with(head));
        if fits(&end) {
            return end;
        }
        (0..=furthest).rev().find(fits).unwrap_or(end)
    }

    fn compare_from(&mut self, segment: &str, start: usize) -> Result<(), Difference> {
        self.reach(start + segment.len());
        let due = self.text.as_bytes().get(start..).unwrap_or_default();
        let same = due.iter().zip(segment.as_bytes()).take_while(|(a, b)| a == b).count();
        if same == segment.len() {
            return Ok(());
        }
        let line = self.ends.partition_point(|&line_end| line_end <= start + same);
        let line_start = if line == 0 { 0 } else { self.ends[line - 1] };
        let expected = self.text[line_start..].lines().next().unwrap_or_default().to_owned();
        let found_start = line_start.saturating_sub(start).min(segment.len());
        let found = segment.get(found_start..).unwrap_or_default().lines().next().unwrap_or_default().to_owned();
        Err(Difference { expected, found })
    }
}
