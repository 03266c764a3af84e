//! When the driver has to tell of requests, and when not.

use super::*;

#[test]
fn a_request_that_comes_while_others_are_begun_is_served_without_a_notification() {
    let mut guest = Guest::new(disk(false, 1), feature::FLUSH | EVENT_IDX);
    let statuses = [guest.offer(0, 1, (DATA, 512)), guest.offer(0, 2, (DATA + 512, 512))];
    // The second is published while the first is begun.
    let (published, event) = (GuestAddress(Driver::ring(0) + 0x4002), Driver::ring(0) + 0x8004 + 8 * u64::from(SIZE));
    let memory = guest.driver.memory.clone();
    memory.write_obj(1_u16, published).unwrap();
    guest.host.state().meanwhile = Some(Box::new(move || {
        let awaited: u16 = memory.read_obj(GuestAddress(event)).unwrap();
        assert_eq!(awaited, 0, "the driver would tell of it");
        memory.write_obj(2_u16, published).unwrap();
    }));
    guest.driver.notify(0);
    assert_eq!(guest.driver.used(0).len(), 2);
    assert_eq!(statuses.map(|at| guest.status(at)), [0, 0]);
    assert_eq!(guest.driver.awaited(0), (2, 2));
}
