export { type CallOptions, type Report, type ReportOutcome, TokenClient } from './client.js';
export { type ErrorDetails, type ErrorKind, TokenBrokerError } from './errors.js';
export { createFetch, type FetchOptions } from './fetch.js';
export type { Logger } from './log.js';
export type { TokenClientOptions } from './settings.js';
export type { Token } from './token.js';
