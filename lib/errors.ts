/** The one class of errors, with codes that programs may rely on. */

/** Every code of a KvError. */
export const errorCodes = [
  'ERR_INNERKV_INVALID_ARGUMENT',
  'ERR_INNERKV_NOT_FINITE',
  'ERR_INNERKV_OUT_OF_MEMORY',
  'ERR_INNERKV_UNSUPPORTED',
  'ERR_INNERKV_DISPOSED',
  'ERR_INNERKV_CORRUPT',
  'ERR_INNERKV_BASIS_MISMATCH',
  'ERR_INNERKV_ABORTED',
  'ERR_INNERKV_INTERNAL',
  'ERR_INNERKV_QUEUE_FULL',
  'ERR_INNERKV_NO_BINARY',
] as const;

/**
 * - `INVALID_ARGUMENT`: a wrong type, length, range or combination; the message names what was expected.
 * - `NOT_FINITE`: NaN, infinity, or a key or value beyond binary16; details: tensor, token, head, channel, value.
 * - `OUT_OF_MEMORY`: the memory budget of the cache, or the machine's memory, is used up.
 * - `UNSUPPORTED`: nothing is wrong with the request, but this build, machine or format cannot serve it.
 * - `DISPOSED`: use after `dispose()`.
 * - `CORRUPT`: a file (a saved sequence, moments, a model) is damaged, cut off or contradicts itself.
 * - `BASIS_MISMATCH`: a saved sequence was made with another calibration.
 * - `ABORTED`: the AbortSignal of the call fired (the promise rejects with the signal's reason).
 * - `QUEUE_FULL`: more than `queueLimit` calls of the backend are under way.
 * - `NO_BINARY`: the native addon could not be loaded.
 * - `INTERNAL`: a mistake in innerkv.
 */
export type ErrorCode = (typeof errorCodes)[number];

/** Facts of an error in machine-readable form; which ones depends on the code. */
export type ErrorDetails = Readonly<Record<string, unknown>>;

/** Thrown by everything in innerkv. After a failed call, caches and sequences are as they were before it. */
export class KvError extends Error {
  override readonly name = 'KvError';
  readonly details: ErrorDetails;

  constructor(
    readonly code: ErrorCode,
    message: string,
    options: { readonly details?: ErrorDetails; readonly cause?: unknown } = {},
  ) {
    super(message, 'cause' in options ? { cause: options.cause } : undefined);
    this.details = options.details ?? {};
  }
}

/** The error of a caller's mistake. */
export function invalid(message: string, details: ErrorDetails = {}): KvError {
  return new KvError('ERR_INNERKV_INVALID_ARGUMENT', message, { details });
}

/** Whether `error` is a KvError of this code, whichever copy of the package made it. */
export function hasCode(error: unknown, code: ErrorCode): boolean {
  return typeof error === 'object' && error !== null && 'code' in error && error.code === code;
}
