// Browsers start no worker for a page that was opened from a file; the search then runs in a frame instead.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inner = this.frame.contentWindow;
    this.listener = (event) => {
      if (event.source !== inner) return;
      const message = new MessageEvent("message", { data: event.data });
      this.dispatchEvent(message);
      this.onmessage?.(message);
    };
    window.addEventListener("message", this.listener);
    const page = inner.document;
    page.open();
    page.write("<html><body></body></html>");
    page.close();
    inner.postMessage = (data) => window.dispatchEvent(new MessageEvent("message", { data, source: inner }));
    const load = (address) =>
      new Promise((done, failed) => {
        const script = page.createElement("script");
        Object.assign(script, { src: address, onload: done, onerror: failed });
        page.body.append(script);
      });
    inner.importScripts = (...addresses) =>
      addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
    this.ready = load(url);
  }
  postMessage(data) {
    this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
  }
  terminate() {
    window.removeEventListener("message", this.listener);
    this.frame.remove();
  }
}
if (location.protocol === "file:") window.Worker = FrameWorker;
