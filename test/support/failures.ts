import { type ErrorCode } from '../../lib/errors';

/** What `toThrow` and `toEqual` compare with: any KvError of this code whose message contains `text`. */
export function failure(code: ErrorCode, text = ''): Error {
  return expect.objectContaining({ name: 'KvError', code, message: expect.stringContaining(text) }) as Error;
}
