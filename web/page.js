// A file dropped, pasted or chosen anywhere on the page goes to the photo box, whatever its type: the box itself would
// accept only what the browser calls an image, and ignore the rest or answer it in gradio's own words. So every file
// is handed to it as an image, and open_image of the program says what is wrong with it. More photos have a box of theirs.
addEventListener("dragover", event => event.preventDefault());
for (const kind of ["change", "drop", "paste"]) addEventListener(kind, event => {
    const file = (event.dataTransfer ?? event.clipboardData ?? event.target).files?.[0];
    const input = document.querySelector("#photo input[type=file]");
    const isImage = file?.type.startsWith("image/");
    if (!file || !input || event.target.closest?.("#more") || (kind === "change" && isImage)) return;
    event.preventDefault();
    event.stopPropagation();
    const nothing = new DragEvent("drop", {bubbles: true, dataTransfer: new DataTransfer()});
    if (kind === "drop") event.target.dispatchEvent(nothing);  // else the box still waits for it
    const files = new DataTransfer();
    files.items.add(isImage ? file : new File([file], file.name, {type: "image/jpeg"}));
    input.files = files.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
}, true);

// A photo that the browser cannot show, such as HEIC, is shown small, as the answer brings it.
document.addEventListener("load", event => {
    const box = document.querySelector("#photo img");
    if (event.target.matches?.("#answer img[hidden]") && box && (!box.naturalWidth || box.src.startsWith("data:")))
        box.src = event.target.src;
}, true);
