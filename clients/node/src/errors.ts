/** What went wrong, and so what a program can do about it. */
export type ErrorKind =
  | 'INVALID_ARGUMENT'
  | 'UNAUTHENTICATED'
  | 'NOT_GRANTED'
  | 'NO_SUCH_ACCOUNT'
  | 'ACCOUNT_DISABLED'
  | 'CREDENTIAL_REJECTED'
  | 'EGRESS_REJECTED'
  | 'UNAVAILABLE'
  | 'OVERLOADED'
  | 'DEADLINE_EXCEEDED'
  | 'CANCELLED'
  | 'CLOSED'
  | 'WRONG_HOST'
  | 'INTERNAL';

const TEMPORARY: ReadonlySet<ErrorKind> = new Set([
  'UNAVAILABLE',
  'OVERLOADED',
  'DEADLINE_EXCEEDED',
  'INTERNAL',
]);

/** What is known of an error besides its kind and its text. */
export interface ErrorDetails {
  /** The account that was asked for. */
  account?: string | undefined;
  /** The name of the gRPC status, such as `PERMISSION_DENIED`, if the broker or gRPC gave one. */
  code?: string | undefined;
  /** The broker's reason, such as `CALLER_RATE`. */
  reason?: string | undefined;
  /** The upstream's own code, if it refused the account's credential. */
  upstreamCode?: string | undefined;
  /** How long to wait before another call, in milliseconds. */
  retryAfterMs?: number | undefined;
  /** @internal Whether the broker asked for no other call before the deadline (`grpc-retry-pushback-ms: -1`). */
  noRetry?: boolean | undefined;
  /** What caused the error, if it was not the broker. */
  cause?: unknown;
}

/** The error with which everything in this package fails. It contains no token and no bearer. */
export class TokenBrokerError extends Error {
  override readonly name = 'TokenBrokerError';
  readonly kind: ErrorKind;
  readonly account: string | undefined;
  readonly code: string | undefined;
  readonly reason: string | undefined;
  readonly upstreamCode: string | undefined;
  readonly retryAfterMs: number | undefined;
  /** @internal */
  readonly noRetry: boolean;

  constructor(kind: ErrorKind, text: string, details: ErrorDetails = {}) {
    super(describe(kind, text, details), details.cause === undefined ? undefined : { cause: details.cause });
    this.kind = kind;
    this.account = details.account;
    this.code = details.code;
    this.reason = details.reason;
    this.upstreamCode = details.upstreamCode;
    this.retryAfterMs = details.retryAfterMs;
    this.noRetry = details.noRetry ?? false;
  }

  /** Whether the same call may succeed later although nobody changes anything. */
  get temporary(): boolean {
    return TEMPORARY.has(this.kind);
  }
}

function describe(kind: ErrorKind, text: string, { account, reason }: ErrorDetails): string {
  const subject = account === undefined ? '' : `account ${account}: `;
  return `${subject}${kind}${reason === undefined || reason === kind ? '' : ` (${reason})`}: ${text}`;
}
