//! `chain MEBIBYTES MILLISECONDS`: prints the hash chain to stdout, a link every so often, for ever.

use std::io::Write;
use std::time::{Duration, Instant};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|word| word.parse::<u64>());
    let (Some(Ok(mebibytes)), Some(Ok(pause)), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("usage: chain MEBIBYTES MILLISECONDS");
        std::process::exit(2);
    };
    let mut chain = tests::lab::chain::Chain::new(usize::try_from(mebibytes).expect("a 64-bit guest"));
    let begun = Instant::now();
    let mut stdout = std::io::stdout().lock();
    loop {
        let (step, hash) = chain.advance();
        // One write a link: the kernel's own messages may come between links, never inside one.
        let line = format!("chain {step} {hash} {}\n", begun.elapsed().as_millis());
        if let Err(error) = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
            eprintln!("chain: the console is gone: {error}");
            std::process::exit(1);
        }
        std::thread::sleep(Duration::from_millis(pause));
    }
}
