//! Packets between guest and host (virtio 1.2, section 5.10.6).

/// `virtio_vsock_hdr`, in bytes.
pub(super) const HEADER: usize = 44;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;
/// `flags` of a shutdown: the sender receives no more.
pub(super) const ENDS_RECEIVING: u32 = 1;
/// `flags` of a shutdown: the sender sends no more.
pub(super) const ENDS_SENDING: u32 = 1 << 1;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    fn of(number: u16) -> Option<Self> {
        let all = [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ];
        all.into_iter().find(|operation| *operation as u16 == number)
    }
}

/// A packet without what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    /// Bytes that it carries.
    pub(super) length: u32,
    pub(super) kind: u16,
    /// `None`: there is no such operation.
    pub(super) operation: Option<Operation>,
    pub(super) flags: u32,
    /// `buf_alloc`: bytes that the sender can keep.
    pub(super) buffer: u32,
    /// `fwd_cnt`: bytes that the sender has passed on so far, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER]) -> Self {
        let mut rest = &bytes[..];
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: Operation::of(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let Self {
            source_cid,
            destination_cid,
            source_port,
            destination_port,
            length,
            kind,
            operation,
            flags,
            buffer,
            forwarded,
        } = self;
        let operation = operation.map_or(0, |operation| operation as u16);
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(source_cid.to_le_bytes());
        bytes.extend(destination_cid.to_le_bytes());
        bytes.extend(source_port.to_le_bytes());
        bytes.extend(destination_port.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(operation.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(buffer.to_le_bytes());
        bytes.extend(forwarded.to_le_bytes());
        bytes
    }
}

/// The next `N` bytes of `rest`, which a header has.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, behind)) = rest.split_first_chunk() else { return [0; N] };
    *rest = behind;
    *first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_lies_as_the_specification_says() {
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: 2,
            source_port: 0x1112_1314,
            destination_port: 0x2122_2324,
            length: 5,
            kind: STREAM,
            operation: Some(Operation::Data),
            flags: 3,
            buffer: 0x3132_3334,
            forwarded: 0x4142_4344,
        };
        let bytes: [u8; HEADER] = header.bytes().try_into().unwrap();
        assert_eq!(bytes[..9], [8, 7, 6, 5, 4, 3, 2, 1, 2]);
        assert_eq!(bytes[16..36], [20, 19, 18, 17, 36, 35, 34, 33, 5, 0, 0, 0, 1, 0, 5, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[36..], [52, 51, 50, 49, 68, 67, 66, 65]);
        assert_eq!(Header::read(&bytes), header);
    }
}
