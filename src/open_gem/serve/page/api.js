// The server: JSON in and out, errors as one line, a token that is asked for once, one request in flight at a time.
const TIMEOUT = 60_000; // milliseconds after which a request is given up
const TOKEN = "open_gem token"; // its place in the session's storage: gone when the tab is

/** What the server would not or could not do; `message` is a line for a person. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds; null where trying again is no use
  }
}

export class Client {
  /** `askToken(wrong)` gives a promise of a token; `wrong` is whether one was refused. */
  constructor(askToken) {
    this.askToken = askToken;
  }

  get token() {
    return sessionStorage.getItem(TOKEN);
  }

  models = () => this.json("v1/models");
  samples = async () => (await this.json("v1/samples")).samples;
  sample = async (name) => (await this.send(`v1/samples/${encodeURIComponent(name)}`)).blob();

  upload(blob, name, signal) {
    const body = new FormData();
    body.append("file", blob, name);
    return this.json("v1/images", { method: "POST", body, signal });
  }

  ground(id, asked, signal) {
    const body = JSON.stringify(asked);
    const headers = { "Content-Type": "application/json" };
    return this.json(`v1/images/${encodeURIComponent(id)}/ground`, { method: "POST", body, headers, signal });
  }

  json = async (path, options) => (await this.send(path, options)).json();

  /** The response to a request, which is sent again with a token where one is needed. Throws ApiError. */
  async send(path, options = {}) {
    const used = this.token;
    const response = await this.fetch(path, options, used);
    if (response.ok) return response;
    if (response.status === 401) {
      if (used === this.token) sessionStorage.setItem(TOKEN, await this.askToken(used !== null));
      return this.send(path, options);
    }
    throw new ApiError(response.status, await reasonOf(response), secondsOf(response));
  }

  async fetch(path, { headers = {}, signal, ...options }, token) {
    const limit = AbortSignal.timeout(TIMEOUT);
    const given = token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
    try {
      return await fetch(path, { ...options, headers: given, signal: signal ? AbortSignal.any([signal, limit]) : limit });
    } catch (error) {
      if (signal?.aborted) throw error;
      const reason = error.name === "TimeoutError" ? `did not answer within ${TIMEOUT / 1000} seconds` : "cannot be reached";
      throw new ApiError(0, `The server ${reason}.`);
    }
  }
}

async function reasonOf(response) {
  try {
    const { error } = await response.json();
    if (typeof error === "string") return error;
  } catch {} // not our server's words, such as a proxy's page
  return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
}

function secondsOf({ status, headers }) {
  const given = headers.get("Retry-After");
  if (status !== 429 && !(status === 503 && given)) return null;
  return Math.min(Math.max(Number(given) || 1, 1), 60);
}

/** Asks for what is missing, one request after another, until nothing is.
 *
 *  `next()` gives the most wanted request as a function of an AbortSignal, or null; it is called only when no request is
 *  in flight, so that of everything typed meanwhile only the newest is asked for.
 */
export class Loop {
  constructor({ next, waiting, failed }) {
    Object.assign(this, { next, waiting, failed, running: false, timer: 0 });
  }

  /** Something may be missing. */
  poke() {
    clearTimeout(this.timer);
    if (!this.running) this.timer = setTimeout(() => this.run()); // after this event, mostly before the next frame
  }

  /** Drop what is in flight: its image is gone. */
  abort() {
    this.controller?.abort();
  }

  async run() {
    if (this.running) return;
    this.running = true;
    try {
      for (let request; (request = this.next()); ) await this.send(request);
    } catch (error) {
      this.failed(error);
    } finally {
      this.running = false;
    }
  }

  /** One request; waits where the server is busy. Throws what waiting does not mend. */
  async send(request) {
    this.controller = new AbortController();
    const { signal } = this.controller;
    try {
      await request(signal);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error.retryAfter > 0)) throw error;
      this.waiting(error);
      await pause(error.retryAfter * 1000, signal);
    }
  }
}

const pause = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
